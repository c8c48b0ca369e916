"""Files at http:// and https:// addresses, read by requests for ranges of bytes.

Proxies come from HTTP_PROXY, HTTPS_PROXY and NO_PROXY, further certificates from SSL_CERT_FILE. An address is written
as for a browser: %20 stands for a space.
"""

import re
from email.utils import parsedate_to_datetime
from functools import lru_cache
from hashlib import sha256
from typing import Any, NamedTuple
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from iwm_fast.pipelines.errors import ChangedError

_MAX_REDIRECTS = 5
# Characters of an address that stay as they are. The others, such as spaces, are written as %20.
_LITERAL = "/%:@!$&'()*+,;=~"
# Without a date of modification, a version is told apart by a number made from its tag. As a time in ns it lies before
# 2002, so that an index of it can be stored at once.
_MAX_TAG = 10**18


class HttpInfo(NamedTuple):
    """What a server tells of a file."""

    size_bytes: int
    changed_ns: int | None
    """Time of modification, or a number derived from the version's tag; None if the server sends neither."""


class HttpFile:
    """A file open for positioned reads; safe to share between threads."""

    def __init__(
        self,
        address: str,
        *,
        headers: dict[str, str],
        connect_timeout_s: float,
        read_timeout_s: float,
        num_connections: int,
    ) -> None:
        """Open the file, which requests its first byte.

        Args:
            address: address of the file.
            headers: headers for the server of the address; servers to which it redirects do not get them.
            connect_timeout_s: time to wait for a connection.
            read_timeout_s: time to wait for the next byte.
            num_connections: largest number of connections that are kept open.

        Raises:
            ValueError: if the server cannot send ranges.
            OSError: if the request fails; the text has the status as "HTTP status 404".
        """
        # Imported here, because local shards need no such package.
        import urllib3  # noqa: PLC0415

        self.address = address
        self._url = quote(address, safe=_LITERAL)
        self._headers = headers
        self._errors: Any = urllib3.exceptions.HTTPError
        self._options: dict[str, Any] = {
            "timeout": urllib3.Timeout(connect=connect_timeout_s, read=read_timeout_s),
            # Requests are repeated only in `iwm_fast.pipelines.storage.remote_file`.
            "retries": urllib3.Retry(
                total=_MAX_REDIRECTS, connect=0, read=0, status=0, other=0, respect_retry_after_header=False
            ),
        }
        self._num_connections = num_connections
        # Stores of large files redirect to another server for some time, with a signature in the address. Asking for it
        # before each read would double the requests, and exceed the first server's limits.
        self._current_url = self._url
        self.info: HttpInfo = self._get_info()
        self.size_bytes: int = self.info.size_bytes

    def _get_info(self) -> HttpInfo:
        status, headers, _ = self._request(0, 1)
        total = headers.get("Content-Range", "").rpartition("/")[2]
        # An empty file has no first byte.
        if not total.isdigit() or (status == 416 and total != "0"):
            raise OSError(f"HTTP status {status} with Content-Range {headers.get('Content-Range')!r}")
        return HttpInfo(int(total), _version_of(headers))

    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, which must lie in the file.

        Raises:
            ChangedError: if the file has another size than when it was opened.
            OSError: if the request fails or the response is incomplete.
        """
        try:
            status, headers, content = self._request(offset, size)
        except OSError as error:
            if self._current_url == self._url or "HTTP status 4" not in str(error):
                raise
            # The signature in the address to which the server redirected has expired.
            self._current_url = self._url
            status, headers, content = self._request(offset, size)
        total = headers.get("Content-Range", "").rpartition("/")[2]
        if total.isdigit() and int(total) != self.size_bytes:
            problem = f"had {self.size_bytes} bytes when it was opened and now has {total}"
            raise ChangedError(f"{self.address} {problem}")
        if status != 206 or len(content) != size:
            raise OSError(f"the server returned {len(content)} of {size} bytes at byte {offset} (HTTP status {status})")
        return content

    def _request(self, offset: int, size: int) -> tuple[int, Any, bytes]:
        url = self._current_url
        headers = {"Range": f"bytes={offset}-{offset + size - 1}", "Accept-Encoding": "identity"}
        parts = urlsplit(url)
        if parts.netloc == urlsplit(self._url).netloc:
            headers |= self._headers
        pool = _pool(parts.scheme, parts.netloc, self._num_connections)
        try:
            response = pool.request("GET", url, headers=headers, preload_content=False, **self._options)
            try:
                if response.status == 200:
                    # Not read: it is the complete file.
                    response.close()
                    raise _no_ranges(self.address)
                content = response.read()
            finally:
                response.release_conn()
        except self._errors as error:
            reason = getattr(error, "reason", None) or error
            raise OSError(f"{type(reason).__name__}: {reason}") from error
        if response.status not in (206, 416):
            raise OSError(f"HTTP status {response.status} {response.reason or ''}".rstrip())
        for redirect in response.retries.history:
            url = urljoin(url, redirect.redirect_location)
        self._current_url = url
        return response.status, response.headers, content

    def close(self) -> None:
        """Do nothing: connections are shared by all files of a server."""


@lru_cache(maxsize=64)
def _pool(scheme: str, host: str, num_connections: int) -> Any:
    """Return the connections to a server."""
    import urllib3  # noqa: PLC0415

    proxy = None if proxy_bypass(host) else getproxies().get(scheme)
    options = {"num_pools": 4, "maxsize": num_connections}
    return urllib3.ProxyManager(proxy, **options) if proxy else urllib3.PoolManager(**options)


def _no_ranges(address: str) -> ValueError:
    problem = "the server sends the complete file instead of a range of bytes (HTTP status 200)"
    remedy = "download the shards, or serve them from a server with range requests, such as nginx or an object store"
    return ValueError(f"{address}: {problem}, so that images cannot be read one by one; {remedy}")


def _version_of(headers: Any) -> int | None:
    try:
        return int(parsedate_to_datetime(headers["Last-Modified"]).timestamp()) * 10**9
    except (KeyError, TypeError, ValueError):
        return version_number(headers["ETag"]) if headers.get("ETag") else None


def version_number(tag: str) -> int:
    """Return a number derived from the tag of a file's version, in place of its time of modification."""
    return int(sha256(re.sub(r"^W/", "", tag).encode()).hexdigest(), 16) % _MAX_TAG
