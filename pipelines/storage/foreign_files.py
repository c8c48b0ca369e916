"""Files that are something else than their name says, recognised by their first bytes."""

import re
from typing import NamedTuple

NUM_BYTES = 512
"""Number of bytes from the beginning of a file that `recognise` needs."""

_LEADING = b"\xef\xbb\xbf \t\r\n"
_DECOMPRESS = "decompress it: images are read by their offset, and they hardly compress"
_DOWNLOAD = "download it again, and check address and access rights"
_PACK = "unpack it and write shards with `iwm shards pack`"


class ForeignFile(NamedTuple):
    """What a file is instead of an archive or of weights, and what to do."""

    problem: str
    remedy: str


_LFS = ForeignFile("is a Git LFS pointer, not the file itself", "run `git lfs pull` in its repository")
_ANNEX = ForeignFile("is a git-annex pointer, not the file itself", "run `git annex get` in its repository")
_BINARY = {
    b"\x1f\x8b": ForeignFile("is compressed with gzip, but must be a plain tar archive", _DECOMPRESS),
    b"BZh": ForeignFile("is compressed with bzip2, but must be a plain tar archive", _DECOMPRESS),
    b"\xfd7zXZ": ForeignFile("is compressed with xz, but must be a plain tar archive", _DECOMPRESS),
    b"\x28\xb5\x2f\xfd": ForeignFile("is compressed with zstd, but must be a plain tar archive", _DECOMPRESS),
    b"\x04\x22\x4d\x18": ForeignFile("is compressed with lz4, but must be a plain tar archive", _DECOMPRESS),
    b"PK\x03\x04": ForeignFile("is a zip archive", _PACK),
    b"7z\xbc\xaf": ForeignFile("is a 7z archive", _PACK),
    b"Rar!": ForeignFile("is a RAR archive", _PACK),
    b"PAR1": ForeignFile("is a Parquet file", "write its images to a folder, and shards with `iwm shards pack`"),
    b"ARROW1": ForeignFile("is an Arrow file", "write its images to a folder, and shards with `iwm shards pack`"),
    b"\x89HDF": ForeignFile("is an HDF5 file", "write its images to a folder, and shards with `iwm shards pack`"),
    b"\xff\xd8\xff": ForeignFile("is a JPEG image", "pack its folder with `iwm shards pack`"),
    b"\x89PNG": ForeignFile("is a PNG image", "pack its folder with `iwm shards pack`"),
}
# Compared in lower case, after white space and a byte order mark. The first match counts.
_TEXT = {
    b"version https://git-lfs": _LFS,
    b"/annex/objects/": _ANNEX,
    b"../.git/annex/": _ANNEX,
    b".git/annex/": _ANNEX,
    b"<!doctype html": ForeignFile("is an HTML page, such as a login or error page", _DOWNLOAD),
    b"<html": ForeignFile("is an HTML page, such as a login or error page", _DOWNLOAD),
    b"<?xml": ForeignFile("is XML, such as the error message of an object store", _DOWNLOAD),
    b"<error": ForeignFile("is XML, such as the error message of an object store", _DOWNLOAD),
    b'{"': ForeignFile("is JSON, such as the error message of a server", _DOWNLOAD),
}


def recognise(start: bytes) -> ForeignFile | None:
    """Return what a file is that begins with these bytes, None if that is not known or it may be a tar archive."""
    # A name in the first header may begin like a signature. All tar dialects in use have this mark.
    if start[257:262] == b"ustar":
        return None
    return _find(start, _BINARY) or recognise_text(start)


def recognise_text(start: bytes) -> ForeignFile | None:
    """Return what a file is that is a text in place of an archive, an image or weights, None if it is none of these."""
    text = start[:NUM_BYTES].lstrip(_LEADING).lower()
    # JSON may have white space after the bracket.
    found = _find(b'{"' if text[:1] == b"{" and text[1:].lstrip()[:1] == b'"' else text, _TEXT)
    code = re.search(rb"<Code>(\w{1,40})</Code>", start[:NUM_BYTES])
    return found._replace(problem=f"{found.problem} ({code[1].decode()})") if found and code else found


def _find(content: bytes, kinds: dict[bytes, ForeignFile]) -> ForeignFile | None:
    return next((kind for start, kind in kinds.items() if content.startswith(start)), None)
