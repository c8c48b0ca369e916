"""Files in repositories of the Hugging Face Hub: hf://datasets/USER/NAME/PATH, or NAME@REVISION for one revision.

The token comes from HF_TOKEN or `hf auth login`, the server from HF_ENDPOINT. Files are listed by huggingface_hub's
`HfFileSystem`, and read by ranges from the server to which the Hub redirects.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar

from pyarrow import fs

from iwm_fast.pipelines.storage.http_file import version_number

_Result = TypeVar("_Result")


def hub_file_info(uri: str) -> fs.FileInfo:
    """Return type and size of a file or folder, and a number for its version in place of the time of modification.

    The type is NotFound if there is no such path.

    Raises:
        FileNotFoundError: if there is no such repository or revision, or it may not be read.
        OSError: if the Hub fails; the text has the status as "HTTP status 500".
    """
    try:
        info = _call(lambda system: system.info(uri))
    except FileNotFoundError as error:
        # The repository's absence has a cause, that of a path in it has none.
        if error.__cause__ is not None:
            raise
        return fs.FileInfo(uri, fs.FileType.NotFound)
    if info["type"] == "directory":
        return fs.FileInfo(uri, fs.FileType.Directory)
    content = info.get("lfs") or {}
    tag = (content.get("sha256") if isinstance(content, dict) else content.sha256) or info.get("blob_id") or ""
    return fs.FileInfo(uri, fs.FileType.File, size=info["size"], mtime_ns=version_number(tag) if tag else None)


def list_hub_files(uri: str) -> list[str]:
    """Return the names of the files directly inside a folder.

    Raises:
        FileNotFoundError, OSError: as in `hub_file_info`.
    """
    entries = _call(lambda system: system.ls(uri, detail=True))
    return [entry["name"].rpartition("/")[2] for entry in entries if entry["type"] == "file"]


def hub_address(uri: str) -> tuple[str, dict[str, str]]:
    """Return the https:// address of a file, and the headers that the Hub asks for.

    Raises:
        FileNotFoundError, OSError: as in `hub_file_info`.
    """
    from huggingface_hub.utils import build_hf_headers  # noqa: PLC0415

    return _call(lambda system: system.url(uri)), build_hf_headers()


def _call(request: Callable[[Any], _Result]) -> _Result:
    """Return the result of a request to the Hub; all of its failures become errors of the file system."""
    # Imported here, because it takes half a second.
    from huggingface_hub import HfFileSystem  # noqa: PLC0415
    from huggingface_hub.errors import HfHubHTTPError  # noqa: PLC0415

    try:
        # The package reads HF_ENDPOINT only when it is imported.
        return request(HfFileSystem(endpoint=os.environ.get("HF_ENDPOINT") or None))
    except HfHubHTTPError as error:
        status = f"HTTP status {error.response.status_code}: " if error.response is not None else ""
        raise OSError(f"{status}{str(error).splitlines()[0]}") from error
    except OSError:
        raise
    except (ValueError, NotImplementedError) as error:
        raise FileNotFoundError(f"{error}; an address is hf://datasets/USER/NAME/PATH") from error
    # Errors of the connection are those of the package's HTTP client, which differs between its versions.
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error
