"""Names, offsets and sizes of the files in a tar archive, read from its headers without unpacking anything.

The three common dialects are read in the same way as by `tarfile` and GNU tar: USTAR (name prefix), GNU (long names,
base-256 sizes) and PAX (`path` and `size` records). An archive in which an offset could be wrong is refused.
"""

import os
import zlib
from collections.abc import Iterator
from typing import NamedTuple

from iwm_fast.pipelines.errors import EmptyShardError, ShardError
from iwm_fast.pipelines.storage.foreign_files import NUM_BYTES, recognise
from iwm_fast.pipelines.storage.remote_file import ChangedError, RemoteFile

BLOCK = 512
# A local read of this size covers the headers and labels between two images, for which webdataset writes up to 5.5 KiB.
LOCAL_STEP = 8 * 1024
# A remote request takes about as long as the transfer of 1 MiB; one request per header would take hours for ImageNet.
REMOTE_STEP = 1024 * 1024

# Type flags of regular files: POSIX, before POSIX, and contiguous files, which count as regular.
_REGULAR = (b"0", b"\0", b"7")
# Links, devices, folders and pipes consist of a header only. Their size field may still hold a number.
_HEADER_ONLY = (b"1", b"2", b"3", b"4", b"5", b"6")
_FOLDER = b"5"


class ShardFile:
    """A shard open for positioned reads, local or remote ("://" in its path); safe to share between threads."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._remote: RemoteFile | None = None
        self._descriptor = -1
        if "://" in path:
            self._remote = RemoteFile(path)
            self.size_bytes = self._remote.size_bytes
        else:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self.size_bytes = os.fstat(self._descriptor).st_size

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file.

        Raises:
            ShardError: if a remote shard has become shorter since it was opened.
            OSError: if the shard cannot be read.
        """
        if self._remote is not None:
            try:
                return self._remote.read_at(offset, size)
            except ChangedError as error:
                problem = f"has changed since it was opened: {error}"
                raise ShardError(problem, shard=self.path, remedy="restart to index it again") from error
        # pread, unlike seek and read, has no file position that threads would have to share.
        content = os.pread(self._descriptor, size, offset)
        # The kernel may return fewer bytes than requested, and never more than 2 GiB at a time.
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
    """A buffer over the part of a shard whose headers are being read, filled in large steps."""

    def __init__(self, file: ShardFile) -> None:
        self.path = file.path
        self.size_bytes = file.size_bytes
        self._file = file
        self._start = 0
        self._content = b""
        self._step = REMOTE_STEP if "://" in file.path else LOCAL_STEP

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`.

        Raises:
            ShardError: if the shard ends earlier.
        """
        if offset + size > self.size_bytes:
            problem = f"is cut off: its headers announce {offset + size} bytes, it has {self.size_bytes}"
            raise self.error(problem, "copy it again")
        if not self._start <= offset <= offset + size <= self._start + len(self._content):
            self._start, self._content = offset, self._file.read_at(offset, max(size, self._step))
        begin = offset - self._start
        return self._content[begin : begin + size]

    def error(self, problem: str, remedy: str = "write the archive again") -> ShardError:
        """Return an error that names this shard."""
        return ShardError(problem, shard=self.path, remedy=remedy)


class TarMember(NamedTuple):
    """A file of an archive, or a link, device or pipe."""

    name: str
    offset: int
    """Offset of its content in the archive, in bytes."""
    size: int
    """Size of its content in bytes."""
    is_file: bool
    """Whether it is a regular file. Links, devices and pipes have no content of their own."""


def tar_members(window: HeaderWindow) -> Iterator[TarMember]:
    """Yield the members of an archive in order, without its folders.

    Raises:
        EmptyShardError: if the file has 0 bytes.
        ShardError: if the archive is compressed, damaged, cut off, unfinished, concatenated, or holds sparse files, or
            the file is not an archive.
    """
    offset = 0
    # PAX records of a global header apply to all later members, those of an extended header to the next member only.
    global_records: dict[str, str] = {}
    next_records: dict[str, str] = {}
    _refuse_foreign(window)
    while (header := _read_header(window, offset)) is not None:
        content_offset, type_flag = offset + BLOCK, header[156:157]
        size = _parse_number(window, header[124:136], "size")
        # GNU long name (L) and long link target (K); PAX extended (x, X in Solaris) and global (g) headers.
        if type_flag in b"LKxXg":
            extension = window.read_at(content_offset, size)
            if type_flag == b"g":
                global_records |= _pax_records(window, extension)
            elif type_flag in b"xX":
                next_records |= _pax_records(window, extension)
            elif type_flag == b"L":
                next_records["path"] = _decode_text(extension)
        else:
            records, next_records = global_records | next_records, {}
            # A sparse file is stored without its holes, so that its bytes are not at consecutive offsets.
            if type_flag == b"S" or (records and any(name.startswith("GNU.sparse") for name in records)):
                raise window.error("holds sparse files", "write it without tar's --sparse")
            size = _pax_size(window, records["size"]) if "size" in records else size
            name = records["path"].rstrip("/") if "path" in records else _header_name(header)
            size = 0 if type_flag in _HEADER_ONLY else size
            if content_offset + size > window.size_bytes:
                end = content_offset + size
                problem = f"is cut off: {name!r} ends at byte {end}, but the archive at byte {window.size_bytes}"
                raise window.error(problem, "copy it again")
            is_file = type_flag in _REGULAR
            # Before POSIX, a folder was a file whose name ends in a slash.
            if type_flag != _FOLDER and not (is_file and name.endswith("/")):
                yield TarMember(name, content_offset, size, is_file)
        # Contents are padded to complete blocks.
        offset = content_offset + -(-size // BLOCK) * BLOCK


def _refuse_foreign(window: HeaderWindow) -> None:
    if window.size_bytes == 0:
        raise EmptyShardError("is an empty file", shard=window.path, remedy="copy it again or remove it")
    foreign = recognise(window.read_at(0, min(NUM_BYTES, window.size_bytes)))
    if foreign is not None:
        raise window.error(*foreign)


def _read_header(window: HeaderWindow, offset: int) -> bytes | None:
    """Return the header at an offset, None for the end-of-archive mark."""
    if offset >= window.size_bytes:
        problem = "has no end-of-archive mark, so it was not written to its end"
        remedy = "write it again, or, if you know it to be complete, append the mark: head -c 1024 /dev/zero >> SHARD"
        raise window.error(problem, remedy)
    header = window.read_at(offset, BLOCK)
    if header.count(0) == BLOCK:
        # Only padding may follow. Other bytes come from archives joined with cat: tar readers stop at the first mark,
        # so that the samples of later archives would be missing without notice.
        padding = window.read_at(offset, min(window.size_bytes - offset, REMOTE_STEP))
        if padding.count(0) != len(padding):
            remedy = "join archives with tar --concatenate, not cat"
            raise window.error("continues after its end-of-archive mark", remedy)
        return None
    # The checksum field itself counts as eight spaces. Some old writers summed signed bytes, in which a byte above 127
    # counts 256 less.
    unsigned = _sum_bytes(header[:148]) + _sum_bytes(header[156:384]) + _sum_bytes(header[384:]) + 8 * ord(" ")
    num_high = 0 if header.isascii() else sum(byte > 127 for byte in header[:148] + header[156:])
    if _parse_number(window, header[148:156], "checksum") not in (unsigned, unsigned - 256 * num_high):
        raise window.error(f"is damaged or not a tar archive: wrong header checksum at byte {offset}")
    return header


def _sum_bytes(content: bytes) -> int:
    """Return the sum of at most 256 bytes, five times as fast as `sum`."""
    # The lower half of Adler-32 is 1 plus the sum modulo 65521, which 256 bytes cannot reach.
    return (zlib.adler32(content) & 0xFFFF) - 1


def _parse_number(window: HeaderWindow, field: bytes, name: str) -> int:
    # GNU writes sizes of 8 GiB and more in base 256, marked by the top bit.
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    if digits.translate(None, b"01234567"):
        raise window.error(f"is damaged or not a tar archive: {name} field {field!r}")
    return int(digits, 8)


def _decode_text(field: bytes) -> str:
    # Names are bytes. surrogateescape keeps those that are not UTF-8.
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _header_name(header: bytes) -> str:
    name = _decode_text(header[:100])
    # GNU headers ("ustar  ") store times where POSIX headers store the prefix.
    prefix = _decode_text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax_size(window: HeaderWindow, value: str) -> int:
    # Checked first, because int() also accepts signs and spaces, and fails on thousands of digits.
    if not (value.isascii() and value.isdigit() and len(value) <= 20):
        raise window.error(f"is damaged: PAX size {value[:40]!r}")
    return int(value)


def _pax_records(window: HeaderWindow, content: bytes) -> dict[str, str]:
    """Parse records: length, space, name=value, line feed; the length counts all bytes of the record."""
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
