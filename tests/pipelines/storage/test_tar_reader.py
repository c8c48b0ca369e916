"""The tar index: all dialects give the same bytes as other readers, and all defects are refused."""

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest
from webdataset.tariterators import group_by_keys, tar_file_expander

from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard import index_shard
from iwm_fast.pipelines.storage.tar_reader import ShardFile

JPEG = b"\xff\xd8 some bytes that look like an image"


def write_tar(path: Path, members: dict, **options) -> Path:
    """Write members in order: bytes for a file, None for a folder, str for a symbolic link, a tuple for a hard link."""
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
            elif isinstance(content, tuple):
                info.type, info.linkname = tarfile.LNKTYPE, content[0]
            else:
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return path


def two_samples(prefix: str = "") -> dict[str, bytes]:
    """Return the members of two samples with distinct contents and images longer than a tar block."""
    return {
        f"{prefix}first.cls": b"7",
        f"{prefix}first.jpg": JPEG * 40,
        f"{prefix}first.json": b'{"a": 1}',
        f"{prefix}second.cls": b"12\n",
        f"{prefix}second.jpg": b"other" * 300,
        f"{prefix}second.json": b"{}",
    }


def images_of(path: Path) -> dict[str, bytes]:
    """Return the images at the offsets of the index."""
    shard = index_shard(str(path))
    with ShardFile(str(path)) as file:
        return {
            key: file.read_at(int(offset), int(size))
            for key, offset, size in zip(shard.keys, shard.image_offset, shard.image_size, strict=True)
        }


def images_by_tarfile(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        files = {member.name: archive.extractfile(member) for member in archive if member.isreg()}
        return {name[:-4]: file.read() for name, file in files.items() if file and name.endswith(".jpg")}


def images_by_webdataset(path: Path) -> dict[str, bytes]:
    # The library would not close a file that it opened itself.
    with path.open("rb") as stream:
        samples = list(group_by_keys(tar_file_expander([{"url": str(path), "stream": stream}])))
    return {sample["__key__"]: sample["jpg"] for sample in samples}


DIALECTS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
PREFIXES = {
    "plain": "",
    "folder": "train/n01440764/",
    "prefix of ustar": "a" * 60 + "/" + "b" * 70 + "/",
    "long name": "c" * 140 + "/" + "d" * 120 + "_",
    "not ascii": "Füße/写真_",
    "spaces": "my pictures/on a beach ",
    "dots in folders": "v1.0/set.a/",
    "dot slash": "./x/",
}


# Names of USTAR have at most 155 + 100 bytes.
DIALECTS_AND_PREFIXES = [
    (dialect, prefix) for dialect in DIALECTS for prefix in PREFIXES if (dialect, prefix) != ("ustar", "long name")
]


@pytest.mark.parametrize(("dialect", "prefix"), DIALECTS_AND_PREFIXES)
def test_image_bytes_equal_those_of_tarfile_and_webdataset(tmp_path, dialect, prefix):
    path = write_tar(tmp_path / "s.tar", two_samples(PREFIXES[prefix]), format=DIALECTS[dialect])
    images = images_of(path)
    assert list(images) == [f"{PREFIXES[prefix]}first", f"{PREFIXES[prefix]}second"]
    assert images == images_by_tarfile(path)
    assert images == images_by_webdataset(path)


@pytest.mark.parametrize("dialect", ["gnu", "pax"])
def test_a_long_name_does_not_apply_to_later_members(tmp_path, dialect):
    members = {"c" * 150 + ".jpg": b"long", "short.jpg": b"short", "d" * 150 + ".jpg": b"again"}
    path = write_tar(tmp_path / "s.tar", members, format=DIALECTS[dialect])
    assert images_of(path) == {"c" * 150: b"long", "short": b"short", "d" * 150: b"again"}


def test_fractional_times_in_pax_headers_do_not_move_offsets(tmp_path):
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        for name, content in two_samples().items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1234.56789
            archive.addfile(info, io.BytesIO(content))
    assert images_of(tmp_path / "s.tar") == images_by_tarfile(tmp_path / "s.tar")


def test_global_pax_headers_are_skipped(tmp_path):
    path = write_tar(tmp_path / "s.tar", two_samples(), format=tarfile.PAX_FORMAT, pax_headers={"comment": "ü" * 600})
    assert images_of(path) == images_by_tarfile(path)


def test_the_size_of_a_pax_record_overrides_the_header(tmp_path):
    record = b"13 size=1000\n"
    extended = tarfile.TarInfo("x")
    extended.type, extended.size = tarfile.XHDTYPE, len(record)
    image = tarfile.TarInfo("a.jpg")
    image.size = 0
    blocks = [extended.tobuf(), record.ljust(512, b"\0"), image.tobuf(), b"i" * 1000 + bytes(24)]
    (tmp_path / "s.tar").write_bytes(b"".join(blocks) + bytes(1024))
    assert images_of(tmp_path / "s.tar") == {"a": b"i" * 1000} == images_by_tarfile(tmp_path / "s.tar")


def test_sizes_in_base_256_are_read(tmp_path):
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (700).to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "s.tar").write_bytes(bytes(header) + (b"i" * 700).ljust(1024, b"\0") + bytes(1024))
    assert images_of(tmp_path / "s.tar") == {"a": b"i" * 700} == images_by_tarfile(tmp_path / "s.tar")


def test_links_folders_and_other_files_between_samples_are_skipped(tmp_path):
    members = {
        "set": None,
        "set/a.cls": b"1",
        "set/link.jpg": "a.jpg",
        "set/a.jpg": JPEG,
        "set/hard.jpg": ("set/a.jpg",),
        "README": b"no extension",
        "set/._b.jpg": b"written by macOS",
        ".hidden.jpg": b"hidden",
        "__meta__": b"metadata",
        "__notes__/x.jpg": b"metadata",
        "set/b.jpg": b"second",
    }
    for dialect in DIALECTS.values():
        path = write_tar(tmp_path / "s.tar", members, format=dialect)
        assert images_of(path) == {"set/a": JPEG, "set/b": b"second"}


def write_damaged(path: Path, defect: str) -> None:
    """Write an archive with a defect."""
    complete = write_tar(path, two_samples()).read_bytes()
    content = {
        "cut inside an image": complete[:2000],
        "cut inside a header": complete[: 1024 + 100],
        "cut between members": complete[:1024],
        "gzip": gzip.compress(complete),
        "garbage": os.urandom(4096),
        "text": b"<html>not found</html>" * 100,
        "nothing": b"",
        "empty archive": bytes(10240),
        "joined with cat": complete + complete,
        "flipped bit in a header": complete[:1030] + bytes([complete[1030] ^ 1]) + complete[1031:],
    }
    path.write_bytes(content[defect])


DEFECTS = {
    "cut inside an image": "cut off.*copy it again",
    "cut inside a header": "cut off.*copy it again",
    "cut between members": "end-of-archive",
    "gzip": "compressed with gzip.*decompress",
    "garbage": "not a tar archive",
    "text": "HTML page",
    "nothing": "empty file",
    "empty archive": "holds no image.*jpg, jpeg, png",
    "joined with cat": "continues after its end-of-archive",
    "flipped bit in a header": "wrong header checksum at byte 1024",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_damaged_shard_is_refused_with_its_path_and_a_remedy(tmp_path, defect):
    path = tmp_path / "s.tar"
    write_damaged(path, defect)
    with pytest.raises(ShardError, match=DEFECTS[defect]) as caught:
        index_shard(str(path))
    assert str(path) in str(caught.value)
    assert caught.value.shard == str(path)


@pytest.mark.parametrize("cut", range(0, 4608, 256))
def test_a_truncated_archive_is_always_noticed(tmp_path, cut):
    complete = write_tar(tmp_path / "s.tar", two_samples()).read_bytes()
    (tmp_path / "s.tar").write_bytes(complete[:cut])
    with pytest.raises(ShardError):
        index_shard(str(tmp_path / "s.tar"))


def test_sparse_archives_are_refused(tmp_path):
    pax = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "a.jpg"}
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("GNUSparseFile.0/a.jpg")
        info.size, info.pax_headers = 4, pax
        archive.addfile(info, io.BytesIO(b"abcd"))
    with pytest.raises(ShardError, match="sparse"):
        index_shard(str(tmp_path / "s.tar"))
