"""The samples of a shard, read from its tar headers: their keys, labels and the byte ranges of their files."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import numpy as np
from jaxtyping import Int64

from iwm_fast.pipelines.config import IMAGE_EXTENSIONS
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.tar_reader import HeaderWindow, ShardFile, TarMember, tar_members

# Top-level members such as __meta__ or __meta__/note.txt hold metadata, not samples (webdataset.tariterators).
_METADATA = re.compile(r"__[^/]*__($|/)")
# A .png next to another image is its segmentation map, so .png is the last choice.
_IMAGE_ORDER = sorted(IMAGE_EXTENSIONS, key=lambda extension: extension == "png")
# More digits than any int64 has, and few enough to be read together with the headers.
_MAX_LABEL_BYTES = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """Index of a tar archive: its samples and the byte ranges of their files, in the order of the archive."""

    path: str
    size_bytes: int
    keys: tuple[str, ...]
    """Key of each sample: the path of its members up to the first dot of the file name."""
    image_offset: Int64[np.ndarray, "samples"]
    """Offset of each encoded image in the archive, in bytes."""
    image_size: Int64[np.ndarray, "samples"]
    """Size of each encoded image in bytes. A size of 0 is accepted here; decoding then reports a bad sample."""
    label: Int64[np.ndarray, "samples"]
    """Class number of each sample from its `.cls` member, -1 if it has none."""
    json_offset: Int64[np.ndarray, "samples"]
    """Offset of each `.json` member in bytes, 0 if the sample has none."""
    json_size: Int64[np.ndarray, "samples"]
    """Size of each `.json` member in bytes, 0 if the sample has none."""
    mask_offset: Int64[np.ndarray, "samples"]
    """Offset in bytes of each segmentation map (`.seg.png`, or `.png` next to another image), 0 if there is none."""
    mask_size: Int64[np.ndarray, "samples"]
    """Size of each segmentation map in bytes, 0 if the sample has none."""
    num_left_out: int = 0
    """Number of samples that are not listed because `iwm shards check` could not decode them."""
    is_checked: bool = False
    """Whether `iwm shards check` has decoded all samples that are listed."""


@dataclass(kw_only=True)
class _Sample:
    """A sample whose members are being collected."""

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    label: int = -1


def index_shard(path: str) -> Shard:
    """Index a shard by reading its headers and labels.

    Raises:
        ShardError: if the archive is damaged, holds no image, repeats a key, or has a sample that cannot be used.
    """
    with ShardFile(path) as file:
        samples = list(_group_members(HeaderWindow(file)))
        size_bytes = file.size_bytes
    images = [_image_member(sample) for sample in samples]
    # Keys without an image, such as a README, are not samples.
    pairs = [(sample, image) for sample, image in zip(samples, images, strict=True) if image is not None]
    if not pairs:
        extensions = sorted({extension for sample in samples for extension in sample.members})
        problem = f"holds no image: the extensions of its members are {extensions or 'none'}"
        raise ShardError(problem, shard=path, remedy=f"accepted extensions are {', '.join(IMAGE_EXTENSIONS)}")
    json_offset, json_size = _byte_ranges([sample.members.get("json") for sample, _ in pairs])
    mask_offset, mask_size = _byte_ranges([_mask_member(sample, image) for sample, image in pairs])
    return Shard(
        path=path,
        size_bytes=size_bytes,
        keys=tuple(sample.key for sample, _ in pairs),
        image_offset=np.array([image.offset for _, image in pairs], np.int64),
        image_size=np.array([image.size for _, image in pairs], np.int64),
        label=np.array([sample.label for sample, _ in pairs], np.int64),
        json_offset=json_offset,
        json_size=json_size,
        mask_offset=mask_offset,
        mask_size=mask_size,
    )


def limit_samples(shard: Shard, count: int) -> Shard:
    """Return a copy of the index that lists only the first `count` samples."""
    per_sample = (entry.name for entry in fields(Shard) if entry.name not in ("path", "size_bytes", "num_left_out"))
    return replace(shard, **{name: getattr(shard, name)[:count] for name in per_sample})


def require_unchanged(shard: Shard, file: ShardFile) -> None:
    """Check that an open shard still has the size that it had when it was indexed.

    Raises:
        ShardError: if its size has changed, because the offsets of the index may then be wrong.
    """
    if file.size_bytes != shard.size_bytes:
        problem = f"has changed since it was indexed, from {shard.size_bytes} to {file.size_bytes} bytes"
        raise ShardError(problem, shard=shard.path, remedy="restart to index it again")


def parse_member_name(name: str) -> tuple[str, str] | None:
    """Split a member's name at the first dot of its file name into key and lower-case extension.

    Returns:
        None if the member belongs to no sample: hidden files (macOS writes ._name), files without extension and
        top-level metadata.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or _METADATA.match(name):
        return None
    return folder + slash + stem, extension.lower()


def _group_members(window: HeaderWindow) -> Iterator[_Sample]:
    """Yield the samples, each a run of consecutive members with the same key, with their labels."""
    seen: set[str] = set()
    current = _Sample(key="")
    for member in tar_members(window):
        parsed = parse_member_name(member.name)
        if parsed is None:
            continue
        key, extension = parsed
        if key != current.key:
            if current.key:
                yield current
            if key in seen:
                problem, remedy = "occurs twice, with other samples between", "write it again with tar --sort=name"
                raise ShardError(problem, shard=window.path, key=key, remedy=remedy)
            seen.add(key)
            current = _Sample(key=key)
        if extension in current.members:
            problem = f"has two members with extension {extension!r}"
            raise ShardError(problem, shard=window.path, key=key, remedy="remove one of them")
        current.members[extension] = member
        if extension == "cls":
            # Read now, while the window over the headers still covers it: a label costs no extra read.
            content = window.read_at(member.offset, min(member.size, _MAX_LABEL_BYTES + 1))
            current.label = _parse_label(content, window.path, key)
    if current.key:
        yield current


def _parse_label(content: bytes, path: str, key: str) -> int:
    digits = content.strip()
    # Longer content was not read completely. isdigit() of bytes accepts only ASCII digits, without a sign.
    if len(content) > _MAX_LABEL_BYTES or not digits.isdigit() or int(digits) >= 2**63:
        remedy = "write the class number as ASCII digits, or remove the member"
        raise ShardError(f".cls must hold an integer >= 0, got {content!r}", shard=path, key=key, remedy=remedy)
    return int(digits)


def _image_member(sample: _Sample) -> TarMember | None:
    return next((sample.members[extension] for extension in _IMAGE_ORDER if extension in sample.members), None)


def _mask_member(sample: _Sample, image: TarMember) -> TarMember | None:
    png = sample.members.get("png")
    return sample.members.get("seg.png") or (png if png is not image else None)


def _byte_ranges(members: list[TarMember | None]) -> tuple[Int64[np.ndarray, "samples"], Int64[np.ndarray, "samples"]]:
    """Return offset and size of each member, both 0 for None. No content has offset 0, where the first header is."""
    ranges = [(member.offset, member.size) if member else (0, 0) for member in members]
    # The copy makes both rows contiguous.
    offset, size = np.array(ranges, np.int64).reshape(-1, 2).T.copy()
    return offset, size
