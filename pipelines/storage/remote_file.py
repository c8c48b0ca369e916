"""Files behind addresses like s3://bucket/folder/name.tar: one client per bucket, and requests that are tried again.

Who may read and where the store is comes from the environment alone (AWS_ACCESS_KEY_ID, AWS_PROFILE, AWS_REGION,
AWS_ENDPOINT_URL, AWS_CA_BUNDLE; GOOGLE_APPLICATION_CREDENTIALS): addresses end up in logs and in saved settings.
An address is taken literally: %20 is no space, # and * are characters like others.
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

SCHEMES = ("s3", "gs", "file")

# Only here is anything tried again: what the clients would repeat by themselves is switched off, or attempts multiply.
# A store that restarts is away for seconds, and one that asks to slow down wants more patience each time: waits of up
# to 1, 2, 4 and 8 s. With the timeouts below a stalled store is given up after about a minute.
NUM_ATTEMPTS = 5
FIRST_WAIT_S = 1.0
# No attempt begins later: Google's client takes 120 s to notice a stall, and pyarrow cannot tell it otherwise.
PATIENCE_S = 150
CONNECT_TIMEOUT_S = 5
# Without a byte for so long a request has stalled. Busy stores take seconds to the first byte.
REQUEST_TIMEOUT_S = 10
# An S3 client holds as many connections as pyarrow has I/O threads when it is made; by default 25, however many read.
MAX_CONNECTIONS = 256

_WHERE = "correct the address, or the store that AWS_ENDPOINT_URL (unset: Amazon's) names"
# pyarrow tells what went wrong only in words: the AWS SDK's, or the status of Google's client
_DENIED = re.compile(
    r"ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH|INVALID_CLIENT_TOKEN_ID|UNRECOGNIZED_CLIENT"
    r"|HTTP status 40[13]\b|PERMISSION_DENIED|UNAUTHENTICATED"
)
_MISSING = re.compile(r"NO_SUCH_BUCKET|NO_SUCH_KEY|NOT_FOUND|HTTP status 404\b|Bucket '.*' not found")
_SHORTER = re.compile(r"HTTP status 416\b|OUT_OF_RANGE")
# redirects and other faults of the request itself; 408 and 429 ask to try again
_REFUSED = re.compile(r"HTTP status (?!408|429)[34]\d\d\b")

# What stands in the last byte before a read. pyarrow's S3 client (26.0.1) reports a whole range even where the answer
# was shorter, and leaves the rest of the memory as it was. Where the content itself may end so, the other mark decides:
# JPEG files end in D9, PNG files in 82, tar files in 00, so that one request is the rule.
_MARKS = (0x5A, 0xA5)

_Result = TypeVar("_Result")
# a generator of its own: waiting must not change what anybody else draws
_jitter = random.SystemRandom()
log = logging.getLogger(__name__)


class ChangedError(OSError):
    """A remote file is no longer the one that was opened."""


class RemoteFile:
    """A remote file open for positioned reads; safe to share between threads."""

    def __init__(self, uri: str) -> None:
        """Open it, which asks the store for its size.

        Raises:
            ValueError: if the address is none, or holds credentials.
            FileNotFoundError, PermissionError: if the store says so.
            OSError: if the store cannot be reached after several attempts.
        """
        self.uri = uri
        self._file, self.size_bytes = _with_retries(uri, "opening it", lambda: _open(uri))

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file.

        Raises:
            ChangedError: if the file has become shorter since it was opened.
            FileNotFoundError, PermissionError, OSError: as at opening.
        """
        size = max(0, min(size, self.size_bytes - offset))
        if size == 0:
            return b""
        return _with_retries(self.uri, f"reading {size} bytes at byte {offset}", lambda: self._read_once(offset, size))

    def _read_once(self, offset: int, size: int) -> bytes:
        content = bytearray(size)
        for mark in _MARKS:
            content[-1] = mark
            with self._file.get_stream(offset, size) as stream:
                num_read = stream.readinto(content)
            if num_read == size and content[-1] != mark:
                return bytes(content)
        size_now = _look_up(self.uri).size
        if size_now != self.size_bytes:
            raise ChangedError(f"{self.uri} had {self.size_bytes} bytes when it was opened and has {size_now} now")
        raise OSError(f"fewer than the {size} bytes at byte {offset} came back")

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def file_info(uri: str) -> fs.FileInfo:
    """Return kind, size and time of change; the kind is NotFound where there is nothing.

    Raises:
        ValueError: if the address is none, or holds credentials.
        FileNotFoundError: if the bucket does not exist.
        PermissionError, OSError: as `RemoteFile`.
    """
    info = _with_retries(uri, "asking what it is", lambda: _look_up(uri))
    if info.type == fs.FileType.NotFound:
        _require_bucket(*_split(uri)[:2])
    return info


def list_files(uri: str) -> list[str]:
    """Return the names of the files directly inside a folder, sorted.

    Raises:
        ValueError: if the address is none, or holds credentials.
        FileNotFoundError, PermissionError, OSError: as `RemoteFile`.
    """
    entries = _with_retries(uri, "listing it", lambda: _client_of(uri).get_file_info(fs.FileSelector(_split(uri).path)))
    return sorted(entry.base_name for entry in entries if entry.type == fs.FileType.File)


class _Address(NamedTuple):
    scheme: str
    bucket: str
    """Empty for file://."""
    path: str
    """What the file system calls it: bucket and key."""


def _split(uri: str) -> _Address:
    """Take an address apart.

    Raises:
        ValueError: if it names no bucket or file, or holds credentials or other options; it does not repeat those.
    """
    scheme, _, rest = uri.partition("://")
    if scheme not in SCHEMES:
        raise ValueError(
            f"a remote address must begin with one of {', '.join(f'{s}://' for s in SCHEMES)}, got {scheme}://"
        )
    bucket = rest.partition("/")[0]
    is_named = bool(rest.startswith("/") if scheme == "file" else re.fullmatch(r"[\w.-]+", bucket))
    if not is_named or "?" in rest:
        shown = re.split("[?:]", rest.rpartition("@")[2])[0]
        form = "/PATH" if scheme == "file" else "BUCKET/PATH"
        raise ValueError(
            f"a remote address must be {scheme}://{form} without user, password or options behind '?', got one for "
            f"{shown!r}; credentials, region and endpoint belong into the environment (AWS_ACCESS_KEY_ID or "
            "AWS_PROFILE, AWS_REGION, AWS_ENDPOINT_URL; GOOGLE_APPLICATION_CREDENTIALS)"
        )
    return _Address(scheme, "" if scheme == "file" else bucket, rest.rstrip("/"))


@lru_cache(maxsize=64)
def _client(scheme: str, bucket: str) -> fs.FileSystem:
    """Make the client of a bucket: each holds its own connections and looks up its own credentials and region."""
    if scheme == "file":
        return fs.LocalFileSystem()
    if scheme == "gs":
        # as good as never tried again by itself: it counts in whole seconds
        return fs.GcsFileSystem(retry_time_limit=timedelta(seconds=1))
    pyarrow.set_io_thread_count(max(pyarrow.io_thread_count(), MAX_CONNECTIONS))
    # pyarrow reads the endpoint from the environment only where it takes no timeouts: in FileSystem.from_uri
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    return fs.S3FileSystem(
        endpoint_override=endpoint,
        # AWS answers only in the bucket's own region, which one request finds; other stores have none
        region=None if endpoint else fs.resolve_s3_region(bucket),
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=REQUEST_TIMEOUT_S,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
        tls_ca_file_path=os.environ.get("AWS_CA_BUNDLE") or None,
    )


def _client_of(uri: str) -> fs.FileSystem:
    address = _split(uri)
    return _client(address.scheme, address.bucket)


def _open(uri: str) -> tuple[pyarrow.NativeFile, int]:
    file = _client_of(uri).open_input_file(_split(uri).path)
    try:
        return file, int(file.size())
    except ValueError as error:
        # Google's client: the first connection failed, which counts as closed
        raise OSError(str(error)) from error


def _look_up(uri: str) -> fs.FileInfo:
    return _client_of(uri).get_file_info(_split(uri).path)


@lru_cache(maxsize=64)
def _require_bucket(scheme: str, bucket: str) -> None:
    """Raise FileNotFoundError if there is no such bucket: the store tells no difference to a missing file."""
    if not bucket:
        return
    uri = f"{scheme}://{bucket}"
    try:
        info = _with_retries(uri, "looking for the bucket", lambda: _look_up(uri))
    except PermissionError:
        # who may read a file need not be allowed to ask about its bucket
        return
    if info.type == fs.FileType.NotFound:
        raise FileNotFoundError(f"bucket {uri} does not exist; {_WHERE}")


def _with_retries(uri: str, what: str, request: Callable[[], _Result]) -> _Result:
    """Carry out a request; try again while it fails for reasons that may pass."""
    begin_s = time.monotonic()
    for attempt in range(1, NUM_ATTEMPTS + 1):
        try:
            return request()
        except ChangedError:
            raise
        except OSError as error:
            final = _final(uri, error)
            if final is not None:
                raise final from error
            if attempt == NUM_ATTEMPTS or time.monotonic() - begin_s > PATIENCE_S:
                raise _retries_exhausted(uri, what, error, attempt, time.monotonic() - begin_s) from error
            wait_s = FIRST_WAIT_S * 2 ** (attempt - 1) * _jitter.uniform(0.5, 1)
            log.warning(
                "%s: %s failed (attempt %d of %d), again in %.1f s: %s", uri, what, attempt, NUM_ATTEMPTS, wait_s, error
            )
        time.sleep(wait_s)
    raise AssertionError("the last attempt returns or raises")


def _final(uri: str, error: OSError) -> OSError | None:
    """Return what to raise where another attempt would change nothing."""
    text = str(error)
    if isinstance(error, PermissionError) or _DENIED.search(text):
        remedy = "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE or GOOGLE_APPLICATION_CREDENTIALS"
        return PermissionError(f"{uri}: the store refuses access ({text}); {remedy}")
    if isinstance(error, FileNotFoundError) or _MISSING.search(text):
        return FileNotFoundError(f"{uri} does not exist or was replaced while it was read ({text}); {_WHERE}")
    if _SHORTER.search(text):
        return ChangedError(f"{uri} is shorter than when it was opened ({text})")
    return OSError(f"{uri}: {text}") if _REFUSED.search(text) else None


def _retries_exhausted(uri: str, what: str, error: OSError, num_attempts: int, seconds: float) -> OSError:
    failure = OSError(f"{uri}: {what} failed: {error}")
    failure.add_note(
        f"{uri} was tried {num_attempts} times in {seconds:.0f} s; check that the store answers and can be reached "
        "from this machine (AWS_ENDPOINT_URL, AWS_REGION, proxies), then start again"
    )
    return failure
