"""Random archives of all dialects: the index finds what a slow reference reader finds, or refuses for the same reason.

The reference uses `tarfile` for names and bytes, and spells out the rule for grouping members. A sample consists of
consecutive members with the same key, which is the path up to the first dot of the file name; the rest in lower case is
the extension. Hidden files, names without a dot and top-level members such as __meta__ belong to no sample.
"""

import io
import tarfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from webdataset.writer import TarWriter

from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard import index_shard
from iwm_fast.pipelines.storage.tar_reader import ShardFile

pytestmark = pytest.mark.timeout(120)

BLOCK = 512
IMAGES = ("jpg", "jpeg", "webp", "bmp", "tif", "tiff", "ppm", "png")
fuzz = settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@dataclass(frozen=True)
class Entry:
    """A member of an archive."""

    name: str
    content: bytes = b""
    kind: bytes = tarfile.REGTYPE


@dataclass(frozen=True)
class Archive:
    """The members of an archive and the options of its writer."""

    entries: tuple[Entry, ...]
    dialect: str
    mtime: float = 0
    global_headers: tuple[tuple[str, str], ...] = ()
    blocks_per_record: int = 20


@dataclass(frozen=True)
class Sample:
    """The contents of a sample; None for a missing member."""

    key: str
    image: bytes
    label: int
    json: bytes | None
    mask: bytes | None


FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
FOLDERS = (
    "a/", "v1.0/set.b/", "./", "/root/", "a//b/", "Füße/写真/", "my pictures/", "../", ".hidden/", "not\udcffutf8/",
    "x" * 90 + "/", "d" * 70 + "/" + "e" * 60 + "/", "l" * 300 + "/", "line\nfeed/", "=12 path=/",
    "__meta__/", "__a__b/", "a/__meta__/",
)  # fmt: skip
STEMS = (
    "0", "00001", "b", "é", "a b ", "写" * 20, "n" * 99, "n" * 101, "n" * 256, "k" * 9000, "", "=", "~", "__x__", "__",
)  # fmt: skip
EXTENSIONS = (
    "jpg", "JPG", "Jpeg", "png", "PNG", "webp", "TIFF", "seg.png", "cls", "json", "JSON",
    "txt", "tar.gz", "", ".jpg", "jpg.bak", "ß",
)  # fmt: skip
CLASSES = (b"0", b"7\n", b" 12 ", b"007", b"9" * 18)
INVALID_CLASSES = (b"3" + b" " * 60, b"0" * 40 + b"5", b"1\0", b"", b"-1", b"cat", b"1.0", b"9" * 20, "٣".encode())
SPECIAL_TYPES = (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)

contents = st.one_of(
    st.sampled_from([b"", b"\0", b"x" * 511, b"y" * 512, b"z" * 513, bytes(1024)]), st.binary(min_size=1, max_size=1600)
)
keys = st.builds(str.__add__, st.one_of(st.just(""), st.sampled_from(FOLDERS)), st.sampled_from(STEMS))
files = st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE])


@st.composite
def samples(draw) -> list[Entry]:
    """Draw the members of a valid sample, in any order."""
    key, image = draw(keys), draw(st.sampled_from(["jpg", "JPG", "png", "webp", "jpeg"]))
    members = [Entry(f"{key}.{image}", draw(contents) + b"i", draw(files))]
    members += [Entry(f"{key}.cls", draw(st.sampled_from(CLASSES)))] if draw(st.booleans()) else []
    members += [Entry(f"{key}.json", draw(contents), draw(files))] if draw(st.booleans()) else []
    other = draw(st.sampled_from(["seg.png", "txt", "txt" if image == "png" else "png"]))
    members += [Entry(f"{key}.{other}", draw(contents))] if draw(st.booleans()) else []
    return draw(st.permutations(members))


@st.composite
def strays(draw) -> list[Entry]:
    """Draw a single member of any type and name."""
    kind = draw(st.one_of(files, st.sampled_from(SPECIAL_TYPES)))
    dot = draw(st.sampled_from([".", ".", ".", "", "/"]))
    extension = draw(st.sampled_from(EXTENSIONS))
    content = draw(st.sampled_from(CLASSES + INVALID_CLASSES)) if extension == "cls" else draw(contents)
    name = draw(keys) + dot + extension
    # Before POSIX such a name stood for a folder. Readers disagree about a folder with content.
    is_old_folder = kind == tarfile.AREGTYPE and name.endswith("/")
    return [Entry(name, b"" if is_old_folder else content, kind)]


@st.composite
def archives(draw) -> Archive:
    """Draw an archive of valid samples and stray members."""
    groups = draw(st.lists(st.one_of(samples(), samples(), samples(), strays()), min_size=1, max_size=7))
    header = st.tuples(
        st.sampled_from(["comment", "VENDOR.x", "charset", "path"]),
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=700),
    )
    return Archive(
        entries=tuple(entry for group in groups for entry in group),
        dialect=draw(st.sampled_from([*FORMATS, "webdataset"])),
        mtime=draw(st.sampled_from([0, 1_700_000_000, 1234.5678, 2.0**40])),
        global_headers=tuple(draw(st.lists(header, max_size=2))),
        blocks_per_record=draw(st.sampled_from([1, 2, 3, 20, 64])),
    )


def to_bytes(archive: Archive) -> bytes:
    """Return the archive's bytes, without members that the dialect or writer cannot represent."""
    file = io.BytesIO()
    if archive.dialect == "webdataset":
        with TarWriter(file, encoder=False, mtime=archive.mtime) as writer:
            for entry in archive.entries:
                folder, slash, base = entry.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if dot and extension and entry.kind == tarfile.REGTYPE:
                    writer.write({"__key__": folder + slash + stem, extension: entry.content})
            end = writer.tarstream.offset
    else:
        headers = dict(archive.global_headers) if archive.dialect == "pax" else None
        with tarfile.open(fileobj=file, mode="w", format=FORMATS[archive.dialect], pax_headers=headers) as tar:
            for entry in archive.entries:
                add(tar, entry, archive.mtime)
            end = tar.offset
    content = file.getvalue()[:end] + bytes(2 * BLOCK)
    return content + bytes(-len(content) % (archive.blocks_per_record * BLOCK))


def add(tar: tarfile.TarFile, entry: Entry, mtime: float) -> None:
    info = tarfile.TarInfo(entry.name)
    # Links and folders have no content, but may state a size.
    info.type, info.mtime, info.size = entry.kind, mtime, len(entry.content)
    if entry.kind == tarfile.AREGTYPE and len(entry.name.encode("utf-8", "surrogateescape")) > 99:
        # tarfile would read it as a folder if the shortened name in the header ends in a slash. Writers avoid this.
        info.type = tarfile.REGTYPE
    if entry.kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        info.linkname = "t" * len(entry.name)
    try:
        tar.addfile(info, io.BytesIO(entry.content) if entry.kind in tarfile.REGULAR_TYPES else None)
    except ValueError:
        assert tar.format == tarfile.USTAR_FORMAT  # USTAR cannot hold all names and times


def padded(size: int) -> int:
    """Return a size rounded up to complete blocks."""
    return -(-size // BLOCK) * BLOCK


@lru_cache(maxsize=4)
def members_of(content: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        return [member for member in tar if member.isreg()]


def reference_samples(content: bytes) -> tuple[list[Sample], list[str]]:
    """Return the samples of an archive and all reasons to refuse it."""
    groups: list[tuple[str, dict[str, bytes]]] = []
    reasons = []
    for member in members_of(content):
        *folders, base = member.name.split("/")
        top = (folders or [base])[0]
        is_metadata = len(top) >= 4 and top.startswith("__") and top.endswith("__")
        if is_metadata or base.startswith(".") or "." not in base:
            continue
        stem, extension = base.split(".", 1)
        key = "/".join([*folders, stem])
        if not groups or groups[-1][0] != key:
            reasons += ["occurs twice"] if key in [other for other, _ in groups] else []
            groups.append((key, {}))
        reasons += ["two members"] if extension.lower() in groups[-1][1] else []
        value = content[member.offset_data : member.offset_data + member.size]
        groups[-1][1][extension.lower()] = value
    result = []
    for key, members in groups:
        image = next((members[extension] for extension in IMAGES if extension in members), None)
        if image is not None:
            is_image_png = not set(IMAGES[:-1]) & set(members)
            mask = members.get("seg.png", None if is_image_png else members.get("png"))
            label = class_number(members.get("cls", b""))
            result.append(Sample(key=key, image=image, label=label, json=members.get("json"), mask=mask))
    return result, reasons or ([] if result else ["holds no image"])


def class_number(content: bytes) -> int:
    is_number = content.strip().isdigit() and len(content) <= 32 and int(content) < 2**63
    return int(content) if is_number else -1


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "s.tar"


def indexed_samples(content: bytes, path: Path) -> list[Sample]:
    """Return the samples of an archive, read through its index."""
    path.write_bytes(content)
    shard = index_shard(str(path))
    with ShardFile(str(path)) as file:

        def read(kind: str, position: int) -> bytes | None:
            offset, size = (int(getattr(shard, f"{kind}_{name}")[position]) for name in ("offset", "size"))
            return file.read_at(offset, size) if offset else None

        return [
            Sample(
                key=key,
                image=read("image", position) or b"",
                label=int(shard.label[position]),
                json=read("json", position),
                mask=read("mask", position),
            )
            for position, key in enumerate(shard.keys)
        ]


def samples_or_refusal(content: bytes, path: Path) -> list[Sample] | None:
    """Return the samples, None if the archive is refused; any other exception is a bug."""
    try:
        return indexed_samples(content, path)
    except ShardError:
        return None


@fuzz
@given(archive=archives())
def test_the_index_agrees_with_the_reference_reader(archive, path):
    content = to_bytes(archive)
    expected, reasons = reference_samples(content)
    if not reasons:
        assert indexed_samples(content, path) == expected
        return
    with pytest.raises(ShardError) as caught:
        indexed_samples(content, path)
    assert any(reason in str(caught.value) for reason in reasons)


@fuzz
@given(archive=archives(), data=st.data())
def test_a_truncated_archive_never_changes_a_sample(archive, data, path):
    content = to_bytes(archive)
    expected, reasons = reference_samples(content)
    cut = data.draw(st.integers(0, len(content) - 1))
    actual = samples_or_refusal(content[:cut], path)
    assert actual is None or (actual == expected and not reasons)
    # An accepted archive has lost only padding: the last block before the cut is the end-of-archive mark.
    assert actual is None or not content[cut - BLOCK :].strip(b"\0")


def check_flip(content: bytes, path: Path, offset: int, flip: int) -> None:
    """Change a byte and check the index: which samples may change depends on what the byte belongs to."""
    expected, reasons = reference_samples(content)
    changed = bytearray(content)
    changed[offset] ^= flip
    actual = samples_or_refusal(bytes(changed), path)
    spans = [range(member.offset_data, member.offset_data + member.size) for member in members_of(content)]
    if any(offset in span for span in spans):
        # No checksum covers the contents, so the changed byte is read.
        expected, reasons = reference_samples(bytes(changed))
        assert actual == expected if not reasons else actual is None
    elif is_extension(content, offset):
        # Nor does one cover extended headers: names of members may change, but not their bytes.
        contents = [content[span.start : span.stop] for span in spans]
        assert actual is None or all(sample.image in contents for sample in actual)
    else:
        assert actual is None or (actual == expected and not reasons)


@lru_cache(maxsize=4)
def extensions(content: bytes) -> list[range]:
    """Return the byte ranges of the contents of PAX and GNU extended headers, by walking over the blocks."""
    ranges, offset = [], 0
    while content[offset : offset + BLOCK].strip(b"\0"):
        info = tarfile.TarInfo.frombuf(content[offset : offset + BLOCK], "utf-8", "surrogateescape")
        size = info.size if info.isreg() or info.type in b"LKxXg" else 0
        ranges += [range(offset + BLOCK, offset + BLOCK + padded(size))] if info.type in b"LKxXg" else []
        offset += BLOCK + padded(size)
    return ranges


def is_extension(content: bytes, offset: int) -> bool:
    return any(offset in span for span in extensions(content))


@fuzz
@given(archive=archives(), data=st.data())
def test_a_changed_byte_affects_only_the_member_that_contains_it(archive, data, path):
    content = to_bytes(archive)
    check_flip(content, path, data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(1, 255)))


SMALL = (
    Entry("é/a.jpg", b"image of a"),
    Entry("é/a.cls", b"7"),
    Entry("b" * 110 + ".png", b"image of b"),
    Entry("c.jpg", b"image of c"),
)


# USTAR has the same headers as GNU, and webdataset writes PAX.
@pytest.mark.parametrize("dialect", ["gnu", "pax"])
def test_any_byte_of_a_small_archive_may_be_damaged(dialect, path):
    content = to_bytes(Archive(SMALL, dialect, mtime=1.5, blocks_per_record=1))
    assert [sample.key for sample in reference_samples(content)[0]] == ["é/a", "b" * 110, "c"]
    written_bytes = [offset for offset, byte in enumerate(content) if byte]
    for offset in (*written_bytes, *range(0, len(content), 97)):
        check_flip(content, path, offset, 1 << offset % 8)


@fuzz
@given(archive=archives(), data=st.data())
def test_arbitrary_headers_with_a_valid_checksum_never_crash_the_index(archive, data, path):
    content = bytearray(to_bytes(archive))
    headers = [member.offset_data - BLOCK for member in members_of(bytes(content))] or [0]
    begin = data.draw(st.sampled_from(headers))
    for _ in range(data.draw(st.integers(1, 3))):
        field = data.draw(st.sampled_from([0, 100, 124, 124, 136, 156, 156, 257, 345]))
        value = data.draw(
            st.one_of(
                st.binary(max_size=12),
                st.sampled_from([b"L", b"x", b"g", b"S", b"\x80" + b"\xff" * 11, b"77777777777\0", b"0000000000\0 "]),
            )
        )
        content[begin + field : begin + field + len(value)] = value
    content[begin + 148 : begin + 156] = b" " * 8
    content[begin + 148 : begin + 156] = b"%06o\0 " % sum(content[begin : begin + BLOCK])
    samples_or_refusal(bytes(content), path)


RECORDS = (
    b"13 size=1000\n", b"10 size=1\n", b"12 path=a/b\n", b"9 path=\n", b"5008 size=" + b"9" * 4997 + b"\n",
    b"11 size=-1\n", b"0 a=b\n",
    b"21 GNU.sparse.size=1\n", b"999 a=b\n", b"8 a=b\n", b"00008 a=\n", b"12 size=\xd9\xa3\n",
)  # fmt: skip


@fuzz
@given(
    records=st.lists(st.one_of(st.binary(max_size=40), st.sampled_from(RECORDS)), max_size=4),
    kind=st.sampled_from([b"x", b"g", b"X", b"L"]),
)
def test_arbitrary_extended_headers_never_crash_the_index(records, kind, path):
    extension = b"".join(records)
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, len(extension)
    image = tarfile.TarInfo("a.jpg")
    image.size = 1100
    content = (
        header.tobuf() + extension.ljust(padded(len(extension)), b"\0") + image.tobuf() + b"i" * 1536 + bytes(1024)
    )
    samples_or_refusal(content, path)


@fuzz
@given(content=st.binary(max_size=3000))
def test_bytes_that_are_not_an_archive_are_refused(content, path):
    assert samples_or_refusal(content, path) is None
