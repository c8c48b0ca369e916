"""Files at addresses like s3://bucket/folder/name.tar: one client per bucket, and requests with retries.

Credentials and the location of the store come only from the environment (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION,
AWS_ENDPOINT_URL, AWS_CA_BUNDLE; GOOGLE_APPLICATION_CREDENTIALS; HF_TOKEN, HF_ENDPOINT), because addresses end up in
logs and saved settings. Addresses are literal: # is an ordinary character, and %20 is decoded to a space only in https://.
"""

import logging
import os
import random
import re
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import NamedTuple, TypeVar

import pyarrow
from pyarrow import fs

from iwm_fast.pipelines.errors import ChangedError
from iwm_fast.pipelines.storage.http_file import HttpFile
from iwm_fast.pipelines.storage.hub import hub_address, hub_file_info, list_hub_files

SCHEMES = ("s3", "gs", "https", "http", "hf", "file")
_HTTP = ("https", "http")

# Requests are repeated only in this file. The retries of the clients are switched off, or attempts would multiply.
# A restarting store is away for seconds, and an overloaded one needs longer pauses each time: waits of up to 1, 2, 4
# and 8 s. With the timeouts below, a request to a stalled store fails after about a minute.
NUM_ATTEMPTS = 5
FIRST_WAIT_S = 1.0
# No attempt starts later than this: Google's client takes 120 s to notice a stall, and pyarrow cannot configure that.
RETRY_DEADLINE_S = 150
CONNECT_TIMEOUT_S = 5.0
# Without a byte for this long, a request has stalled. Busy stores take seconds until the first byte.
REQUEST_TIMEOUT_S = 10.0
# An S3 client holds as many connections as pyarrow has I/O threads at its creation. The default of 25 would limit the
# number of concurrent reads.
MAX_CONNECTIONS = 256

_AWS_ADDRESS = "correct the address, or AWS_ENDPOINT_URL, which names the store (unset: Amazon's)"
_AWS_ACCESS = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or GOOGLE_APPLICATION_CREDENTIALS"
_HUB_ACCESS = "log in with `hf auth login` or set HF_TOKEN, and accept the data set's conditions on its page"
_HTTP_ADDRESS, _HTTP_ACCESS = "correct the address", "use an address that needs no login, or download the shards"
# What to do about an address that does not exist, and about refused access.
_REMEDIES = {
    "hf": (f"correct user, name, revision or path; if the repository is private, {_HUB_ACCESS}", _HUB_ACCESS),
    **dict.fromkeys(_HTTP, (_HTTP_ADDRESS, _HTTP_ACCESS)),
}
_OTHER_SCHEMES = {
    "pipe": "a command's output cannot be read by offsets: name the address itself",
    "gcs": "write gs://",
    "az": "serve the container at an https:// address, or mount it",
}
# pyarrow reports the reason of a failure only as text: the AWS SDK's, or the status of Google's client.
_DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|UNRECOGNIZED_CLIENT"
    r"|HTTP status 40[13]\b|PERMISSION_DENIED|UNAUTHENTICATED"
)
_MISSING = re.compile(r"NO_SUCH_BUCKET|NO_SUCH_KEY|NOT_FOUND|HTTP status 404\b|Bucket '.*' not found")
_TRUNCATED = re.compile(r"HTTP status 416\b|OUT_OF_RANGE")
# Redirects and other errors of the request itself. 408 (timeout) and 429 (too many requests) are worth a retry.
_REFUSED = re.compile(r"HTTP status (?!408|429)[34]\d\d\b")

# Values of the buffer's last byte before a read. pyarrow's S3 client (26.0.1) reports a complete range even if the
# response was shorter, and leaves the rest of the buffer unchanged. If the content itself may end in the first value,
# a second read with the other one decides. Files rarely end in the first (JPEG: D9, PNG: 82, tar: 00), so that one
# request is usually enough.
_SENTINELS = (0x5A, 0xA5)

_Result = TypeVar("_Result")
# A separate generator, because a retry must not change what the global one draws.
_jitter = random.SystemRandom()
log = logging.getLogger(__name__)


class RemoteFile:
    """A remote file open for positioned reads; safe to share between threads."""

    def __init__(self, uri: str) -> None:
        """Open the file, which requests its size from the store.

        Raises:
            ValueError: if the address is malformed or contains credentials, or its server cannot send ranges.
            FileNotFoundError: if the file or its bucket does not exist.
            PermissionError: if the store refuses access.
            OSError: if the store still fails after several attempts.
        """
        self.uri = uri
        self._file = _with_retries(uri, "opening", lambda: _open(uri))
        self.size_bytes: int = self._file.size_bytes

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file.

        Raises:
            ChangedError: if the file has become shorter since it was opened.
            FileNotFoundError: if the file no longer exists.
            PermissionError: if the store refuses access.
            OSError: if the store still fails after several attempts.
        """
        size = max(0, min(size, self.size_bytes - offset))
        # HTTP cannot express an empty range, and the check below needs a last byte.
        if size == 0:
            return b""
        return _with_retries(self.uri, f"reading {size} bytes at byte {offset}", lambda: self._file.read(offset, size))

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


class _StoreFile:
    """A file that pyarrow reads, with the methods of `HttpFile`."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._file: pyarrow.NativeFile = _client_of(uri).open_input_file(_parse_uri(uri).path)
        try:
            self.size_bytes: int = int(self._file.size())
        except ValueError as error:
            # If the first connection of Google's client fails, pyarrow raises a ValueError about a closed file.
            raise OSError(str(error)) from error

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`; see `HttpFile.read`."""
        content = bytearray(size)
        for sentinel in _SENTINELS:
            content[-1] = sentinel
            with self._file.get_stream(offset, size) as stream:
                num_read = stream.readinto(content)
            if num_read == size and content[-1] != sentinel:
                return bytes(content)
        # Either the file has become shorter, or the connection ended too early, which a retry may mend.
        current_size = _get_info(self._uri).size
        if current_size != self.size_bytes:
            raise ChangedError(f"{self._uri} had {self.size_bytes} bytes when it was opened and now has {current_size}")
        raise OSError(f"the store returned fewer than {size} bytes at byte {offset}")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def _open(uri: str) -> _StoreFile | HttpFile:
    scheme = _parse_uri(uri).scheme
    if scheme == "hf":
        return _open_http(*hub_address(uri))
    return _open_http(uri, {}) if scheme in _HTTP else _StoreFile(uri)


def _open_http(address: str, headers: dict[str, str]) -> HttpFile:
    return HttpFile(
        address,
        headers=headers,
        connect_timeout_s=CONNECT_TIMEOUT_S,
        read_timeout_s=REQUEST_TIMEOUT_S,
        num_connections=MAX_CONNECTIONS,
    )


def file_info(uri: str) -> fs.FileInfo:
    """Return type, size and modification time of a file or folder; the type is NotFound if it does not exist.

    Raises:
        ValueError: if the address is malformed or contains credentials.
        FileNotFoundError: if the bucket does not exist.
        PermissionError: if the store refuses access.
        OSError: if the store still fails after several attempts.
    """
    info = _with_retries(uri, "looking it up", lambda: _get_info(uri))
    if info.type == fs.FileType.NotFound:
        address = _parse_uri(uri)
        if address.scheme in ("s3", "gs"):
            _require_bucket(address.scheme, address.bucket)
    return info


def list_files(uri: str) -> list[str]:
    """Return the names of the files directly inside a folder, sorted.

    Raises:
        ValueError: if the address is malformed or contains credentials.
        FileNotFoundError: if the folder or its bucket does not exist.
        PermissionError: if the store refuses access.
        OSError: if the store still fails after several attempts.
    """
    return sorted(_with_retries(uri, "listing", lambda: _list(uri)))


def _list(uri: str) -> list[str]:
    address = _parse_uri(uri)
    if address.scheme in _HTTP:
        raise ValueError(f"the files at {uri} cannot be listed; name them, for example with braces as in {{000..099}}")
    if address.scheme == "hf":
        return list_hub_files(uri)
    entries = _client_of(uri).get_file_info(fs.FileSelector(address.path))
    return [entry.base_name for entry in entries if entry.type == fs.FileType.File]


class _Address(NamedTuple):
    scheme: str
    bucket: str
    """Empty for file://."""
    path: str
    """Path in pyarrow's file system, which begins with the bucket."""


def _parse_uri(uri: str) -> _Address:
    """Parse and check an address.

    Raises:
        ValueError: if it names no bucket or file, or contains credentials or other options; these are not repeated.
    """
    scheme, _, rest = uri.partition("://")
    if scheme not in SCHEMES:
        accepted = ", ".join(f"{name}://" for name in SCHEMES)
        hint = next((f"; {text}" for name, text in _OTHER_SCHEMES.items() if scheme.startswith(name)), "")
        # What follows may contain credentials.
        raise ValueError(f"a remote address must begin with one of {accepted}, got {scheme.partition(':')[0]}:{hint}")
    # A bucket name has no "@" or ":", which precede or separate credentials.
    bucket = rest.partition("/")[0]
    # A server may have a port, such as 127.0.0.1:8000.
    name = r"[\w.-]+(:\d+)?" if scheme in _HTTP else r"[\w.-]+"
    is_named = bool(rest.startswith("/") if scheme == "file" else re.fullmatch(name, bucket))
    if not is_named or "?" in rest:
        # The message ends up in logs: it names neither what precedes "@" nor what follows ":" or "?".
        without_credentials = re.split("[?:]", rest.rpartition("@")[2])[0]
        form = "/PATH" if scheme == "file" else "BUCKET/PATH"
        raise ValueError(
            f"a remote address must be {scheme}://{form} without user, password or options after '?', got one of "
            f"{without_credentials!r}; credentials, region and endpoint belong in the environment (AWS_ACCESS_KEY_ID "
            "or AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL; GOOGLE_APPLICATION_CREDENTIALS)"
        )
    return _Address(scheme, "" if scheme == "file" else bucket, rest.rstrip("/"))


@lru_cache(maxsize=64)
def _client(scheme: str, bucket: str) -> fs.FileSystem:
    """Return the client of a bucket; each one has its own connections, credentials and region."""
    if scheme == "file":
        return fs.LocalFileSystem()
    if scheme == "gs":
        # The shortest limit, since it counts in seconds: the client practically never retries by itself.
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=1))
    pyarrow.set_io_thread_count(max(pyarrow.io_thread_count(), MAX_CONNECTIONS))
    # pyarrow reads the endpoint from the environment only in FileSystem.from_uri, which accepts no timeouts.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        # AWS serves a bucket only from its own region, which takes one request to find. Other stores have no regions.
        region=None if endpoint else fs.resolve_s3_region(bucket),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
        tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE") or None,
    )


def _client_of(uri: str) -> fs.FileSystem:
    address = _parse_uri(uri)
    return _client(address.scheme, address.bucket)


def _get_info(uri: str) -> fs.FileInfo:
    scheme = _parse_uri(uri).scheme
    if scheme == "hf":
        return hub_file_info(uri)
    if scheme in _HTTP:
        return _get_http_info(uri)
    return _client_of(uri).get_file_info(_parse_uri(uri).path)


def _get_http_info(uri: str) -> fs.FileInfo:
    if "*" in uri or uri.endswith("/"):
        # Raises an error about listing.
        _list(uri)
    try:
        info = _open_http(uri, {}).info
    except OSError as error:
        if _MISSING.search(str(error)):
            return fs.FileInfo(uri, fs.FileType.NotFound)
        raise
    return fs.FileInfo(uri, fs.FileType.File, size=info.size_bytes, mtime_ns=info.changed_ns)


# Cached, so that many missing files in a bucket cost a single request for it.
@lru_cache(maxsize=64)
def _require_bucket(scheme: str, bucket: str) -> None:
    """Raise FileNotFoundError if a bucket does not exist, which stores report like a missing file."""
    uri = f"{scheme}://{bucket}"
    try:
        info = _with_retries(uri, "looking up the bucket", lambda: _get_info(uri))
    except PermissionError:
        # Permission to read a file does not include permission to query its bucket.
        return
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"bucket {uri} does not exist; {_AWS_ADDRESS}")


def _with_retries(uri: str, operation: str, request: Callable[[], _Result]) -> _Result:
    """Return the result of a request, repeated after failures that may be temporary; errors name the operation."""
    begin_s = time.monotonic()
    for attempt in range(1, NUM_ATTEMPTS + 1):
        try:
            return request()
        except ChangedError:
            raise
        except OSError as error:
            permanent = _permanent_error(uri, error)
            if permanent is not None:
                raise permanent from error
            if attempt == NUM_ATTEMPTS or time.monotonic() - begin_s > RETRY_DEADLINE_S:
                raise _retries_exhausted(uri, operation, error, attempt, time.monotonic() - begin_s) from error
            # The waits double, and jitter keeps many readers from returning to a restarted store at the same moment.
            wait_s = FIRST_WAIT_S * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1)
            count = f"attempt {attempt} of {NUM_ATTEMPTS}"
            log.warning("%s: %s failed (%s), next attempt in %.1f s: %s", uri, operation, count, wait_s, error)
        time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _permanent_error(uri: str, error: OSError) -> OSError | None:
    """Return the error to raise if another attempt would fail as well, None if it may succeed."""
    text = str(error)
    address_remedy, access_remedy = _REMEDIES.get(uri.partition("://")[0], (_AWS_ADDRESS, _AWS_ACCESS))
    if isinstance(error, PermissionError) or _DENIED.search(text):
        return PermissionError(f"{uri}: the store refuses access ({text}); {access_remedy}")
    if isinstance(error, FileNotFoundError) or _MISSING.search(text):
        return FileNotFoundError(f"{uri} does not exist or was replaced during the read ({text}); {address_remedy}")
    if _TRUNCATED.search(text):
        return ChangedError(f"{uri} is shorter than when it was opened ({text})")
    return OSError(f"{uri}: {text}") if _REFUSED.search(text) else None


def _retries_exhausted(uri: str, operation: str, error: OSError, num_attempts: int, seconds: float) -> OSError:
    failure = OSError(f"{uri}: {operation} failed: {error}")
    failure.add_note(
        f"{uri} failed {num_attempts} times in {seconds:.0f} s; check that the store responds and can be reached from "
        "this machine (AWS_ENDPOINT_URL, AWS_REGION, proxies), then start again"
    )
    return failure
