"""Where the files inside a tar archive begin and end, read from its headers without unpacking anything.

Understands the three dialects in use, as `tarfile` and GNU tar read them: USTAR (name prefix), GNU (long names,
base-256 sizes) and PAX (`path` and `size` records). Anything that could make an offset wrong is refused.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.remote_file import ChangedError, RemoteFile

BLOCK = 512
# One local read holds the headers and labels between two images (webdataset writes up to 5.5 KiB of them).
LOCAL_STEP = 8 * 1024
# A remote request costs as long as about 1 MiB of transfer; one per header would take hours for ImageNet.
REMOTE_STEP = 1024 * 1024

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_REGULAR = (b"0", b"\0", b"7")
# links, devices, folders, pipes: a header only, whatever its size field says
_WITHOUT_CONTENT = (b"1", b"2", b"3", b"4", b"5", b"6")


class ShardFile:
    """A shard open for positioned reads, local or remote ("://" in its path); safe to share between threads."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._remote, self._descriptor = None, -1
        if "://" in path:
            self._remote = RemoteFile(path)
            self.size_bytes = self._remote.size_bytes
        else:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size_bytes = os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file.

        Raises:
            ShardError: if a remote shard has changed since it was opened.
            OSError: if it cannot be read.
        """
        if self._remote is not None:
            try:
                return self._remote.read_at(offset, size)
            except ChangedError as error:
                what = f"has changed since it was opened: {error}"
                raise ShardError(what, shard=self.path, remedy="restart to index it again") from error
        content = os.pread(self._descriptor, size, offset)
        # the kernel may hand over less than asked, and never more than 2 GiB at once
        while len(content) < size and (more := os.pread(self._descriptor, size - len(content), offset + len(content))):
            content += more
        return content

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        if self._remote is not None:
            self._remote.close()
        elif self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class HeaderWindow:
    """Bytes of a shard around the header that is read next, fetched in large steps."""

    def __init__(self, file: ShardFile) -> None:
        self.path, self.size_bytes = file.path, file.size_bytes
        self._file, self._start, self._content = file, 0, b""
        self._step = REMOTE_STEP if "://" in file.path else LOCAL_STEP

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`.

        Raises:
            ShardError: if the shard ends before.
        """
        if offset + size > self.size_bytes:
            raise self.error(
                f"is cut off: {offset + size} bytes are announced, it has {self.size_bytes}", "copy it again"
            )
        if not self._start <= offset <= offset + size <= self._start + len(self._content):
            self._start, self._content = offset, self._file.read_at(offset, max(size, self._step))
        begin = offset - self._start
        return self._content[begin : begin + size]

    def error(self, what: str, remedy: str = "write the archive again") -> ShardError:
        """Make the error that names this shard."""
        return ShardError(what, shard=self.path, remedy=remedy)


class TarMember(NamedTuple):
    """One regular file of an archive."""

    name: str
    offset: int
    """Where its content begins in the archive, in bytes."""
    size: int
    """Length of its content in bytes."""


def tar_members(window: HeaderWindow) -> Iterator[TarMember]:
    """Yield the regular files of an archive in their order; links, folders and devices are passed over.

    Raises:
        ShardError: if the archive is compressed, damaged, cut off, not finished, joined from several, or sparse.
    """
    offset, shared, own = 0, {}, {}
    _refuse_compressed(window)
    while (header := _read_header(window, offset)) is not None:
        content, kind = offset + BLOCK, header[156:157]
        size = _number(window, header[124:136], "size")
        if kind in b"LKxXg":
            extension = window.read_at(content, size)
            if kind == b"g":
                shared |= _pax_records(window, extension)
            elif kind in b"xX":
                own |= _pax_records(window, extension)
            elif kind == b"L":
                own["path"] = _text(extension)
        else:
            fields, own = shared | own, {}
            if kind == b"S" or any(name.startswith("GNU.sparse") for name in fields):
                raise window.error("holds sparse files", "write it with tar's --sparse left out")
            size = _pax_size(window, fields["size"]) if "size" in fields else size
            name = fields["path"].rstrip("/") if "path" in fields else _header_name(header)
            size = 0 if kind in _WITHOUT_CONTENT else size
            if content + size > window.size_bytes:
                what = f"is cut off: {name!r} ends at byte {content + size}, the file at {window.size_bytes}"
                raise window.error(what, "copy it again")
            # before POSIX a folder was a file whose name ends in a slash
            if kind in _REGULAR and not name.endswith("/"):
                yield TarMember(name, content, size)
        offset = content + -(-size // BLOCK) * BLOCK


def _refuse_compressed(window: HeaderWindow) -> None:
    if window.size_bytes == 0:
        raise window.error("is an empty file", "copy it again")
    start = window.read_at(0, min(8, window.size_bytes))
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            remedy = "decompress it: single images are read by position, and images hardly compress"
            raise window.error(f"is compressed with {name}; plain tar is needed", remedy)


def _read_header(window: HeaderWindow, offset: int) -> bytes | None:
    if offset >= window.size_bytes:
        what = "has no end-of-archive mark: whoever wrote it did not finish"
        remedy = "write it again, or, if it is known to be whole, append the mark: head -c 1024 /dev/zero >> SHARD"
        raise window.error(what, remedy)
    header = window.read_at(offset, BLOCK)
    if header.count(0) == BLOCK:
        rest = window.read_at(offset, min(window.size_bytes - offset, REMOTE_STEP))
        if rest.count(0) != len(rest):
            raise window.error(
                "goes on behind its end-of-archive mark", "join archives with tar --concatenate, not cat"
            )
        return None
    # the checksum field counts as eight spaces; some old writers summed signed bytes
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    num_high = 0 if header.isascii() else sum(byte > 127 for byte in header[:148] + header[156:])
    if _number(window, header[148:156], "checksum") not in (unsigned, unsigned - 256 * num_high):
        raise window.error(f"is not a tar archive or damaged: wrong header checksum at byte {offset}")
    return header


def _number(window: HeaderWindow, field: bytes, what: str) -> int:
    # GNU writes sizes of 8 GiB and more in base 256, marked by the top bit
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    if digits.translate(None, b"01234567"):
        raise window.error(f"is not a tar archive or damaged: {what} field {field!r}")
    return int(digits, 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _header_name(header: bytes) -> str:
    name = _text(header[:100])
    # GNU headers ("ustar  ") keep times where POSIX keeps the prefix
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax_size(window: HeaderWindow, value: str) -> int:
    # int() refuses thousands of digits with an error of its own
    if not (value.isascii() and value.isdigit() and len(value) <= 20):
        raise window.error(f"is damaged: PAX size {value[:40]!r}")
    return int(value)


def _pax_records(window: HeaderWindow, content: bytes) -> dict[str, str]:
    """Read records: length, space, name=value, line feed; the length counts the whole record."""
    records, begin = {}, 0
    while begin < len(content):
        digits, space, _ = content[begin : begin + 20].partition(b" ")
        end = begin + int(digits) if digits.isdigit() else begin
        name, equals, value = content[begin + len(digits) + 1 : end - 1].partition(b"=")
        if not space or not equals or content[end - 1 : end] != b"\n":
            raise window.error(f"is damaged: PAX record {content[begin : begin + 40]!r}")
        records[name.decode("utf-8", "surrogateescape")] = value.decode("utf-8", "surrogateescape")
        begin = end
    return records
