"""One shard's samples, read from its tar headers: which there are, where their files lie, which class they have."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import numpy as np
from jaxtyping import Int64

from iwm_fast.pipelines.config import IMAGE_EXTENSIONS
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.tar_reader import HeaderWindow, ShardFile, TarMember, tar_members

# top-level members like __meta__ or __meta__/note.txt are no samples (webdataset.tariterators)
_METADATA = re.compile(r"__[^/]*__($|/)")
# a .png beside another image is its segmentation map, so it is looked for last
_IMAGE_ORDER = sorted(IMAGE_EXTENSIONS, key=lambda extension: extension == "png")
# more digits than any int64 has, and still within the bytes read for the headers
_LONGEST_LABEL = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """One tar archive: which samples it holds and where their files lie, in the order of the archive."""

    path: str
    size_bytes: int
    keys: tuple[str, ...]
    """Name of each sample: its files' path up to the first dot of the file name."""
    image_offset: Int64[np.ndarray, "samples"]
    """Where each encoded image begins, in bytes."""
    image_size: Int64[np.ndarray, "samples"]
    """Length of each encoded image in bytes; one of 0 is bad like others that cannot be decoded."""
    label: Int64[np.ndarray, "samples"]
    """Class number from the `.cls` member, -1 where there is none."""
    json_offset: Int64[np.ndarray, "samples"]
    """Where each `.json` member begins, in bytes, 0 where there is none."""
    json_size: Int64[np.ndarray, "samples"]
    """Length of each `.json` member in bytes, 0 where there is none."""
    mask_offset: Int64[np.ndarray, "samples"]
    """Where each segmentation map begins (`.seg.png`, or `.png` beside another image), 0 where there is none."""
    mask_size: Int64[np.ndarray, "samples"]
    """Length of each segmentation map in bytes, 0 where there is none."""
    num_left_out: int = 0
    """Samples that are not listed because `iwm shards check` found that they cannot be decoded."""


@dataclass(kw_only=True)
class _Sample:
    """A sample while its members are read."""

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    label: int = -1


def index_shard(path: str) -> Shard:
    """Read the headers and labels of one shard.

    Raises:
        ShardError: if the archive is damaged, holds no image, repeats a key, or a sample cannot be used.
    """
    with ShardFile(path) as file:
        samples = list(_group_members(HeaderWindow(file)))
        size_bytes = file.size_bytes
    images = [_image(sample) for sample in samples]
    kept = [(sample, image) for sample, image in zip(samples, images, strict=True) if image is not None]
    if not kept:
        extensions = sorted({extension for sample in samples for extension in sample.members})
        what = f"holds no image: extensions found are {extensions or 'none'}"
        raise ShardError(what, shard=path, remedy=f"accepted are {', '.join(IMAGE_EXTENSIONS)}")
    json_offset, json_size = _spans([sample.members.get("json") for sample, _ in kept])
    mask_offset, mask_size = _spans([_mask(sample, image) for sample, image in kept])
    return Shard(
        path=path,
        size_bytes=size_bytes,
        keys=tuple(sample.key for sample, _ in kept),
        image_offset=np.array([image.offset for _, image in kept], np.int64),
        image_size=np.array([image.size for _, image in kept], np.int64),
        label=np.array([sample.label for sample, _ in kept], np.int64),
        json_offset=json_offset,
        json_size=json_size,
        mask_offset=mask_offset,
        mask_size=mask_size,
    )


def first_samples(shard: Shard, count: int) -> Shard:
    """Return a shard as if it held its first so many samples only."""
    per_sample = (one.name for one in fields(Shard) if one.name not in ("path", "size_bytes", "num_left_out"))
    return replace(shard, **{name: getattr(shard, name)[:count] for name in per_sample})


def require_unchanged(shard: Shard, file: ShardFile) -> None:
    """Check that an open shard has the size it had when it was indexed.

    Raises:
        ShardError: if it has not.
    """
    if file.size_bytes != shard.size_bytes:
        what = f"has changed since it was indexed, from {shard.size_bytes} to {file.size_bytes} bytes"
        raise ShardError(what, shard=shard.path, remedy="restart to index it again")


def parse_member_name(name: str) -> tuple[str, str] | None:
    """Split a member's name into key and lower-case extension, at the first dot of the file name.

    None where the member belongs to no sample: hidden files (macOS writes ._name), no extension, top-level metadata.
    """
    folder, slash, base = name.rpartition("/")
    stem, dot, extension = base.partition(".")
    if not stem or not dot or _METADATA.match(name):
        return None
    return folder + slash + stem, extension.lower()


def _group_members(window: HeaderWindow) -> Iterator[_Sample]:
    """Gather neighbours with the same key; labels are read on the way, while their bytes are at hand."""
    seen: set[str] = set()
    current = _Sample(key="")
    for member in tar_members(window):
        split = parse_member_name(member.name)
        if split is None:
            continue
        key, extension = split
        if key != current.key:
            if current.key:
                yield current
            if key in seen:
                what, remedy = "comes twice, with other samples between", "write it again with tar --sort=name"
                raise ShardError(what, shard=window.path, key=key, remedy=remedy)
            seen.add(key)
            current = _Sample(key=key)
        if extension in current.members:
            what = f"has two members with extension {extension!r}"
            raise ShardError(what, shard=window.path, key=key, remedy="leave one of them out")
        current.members[extension] = member
        if extension == "cls":
            content = window.read_at(member.offset, min(member.size, _LONGEST_LABEL + 1))
            current.label = _parse_label(content, window.path, key)
    if current.key:
        yield current


def _parse_label(content: bytes, path: str, key: str) -> int:
    digits = content.strip()
    # longer content was not read to its end
    if len(content) > _LONGEST_LABEL or not digits.isdigit() or int(digits) >= 2**63:
        remedy = "write the class number as ASCII digits, or leave the member out"
        raise ShardError(f".cls must hold an integer >= 0, got {content!r}", shard=path, key=key, remedy=remedy)
    return int(digits)


def _image(sample: _Sample) -> TarMember | None:
    return next((sample.members[extension] for extension in _IMAGE_ORDER if extension in sample.members), None)


def _mask(sample: _Sample, image: TarMember) -> TarMember | None:
    beside = sample.members.get("png")
    return sample.members.get("seg.png") or (beside if beside is not image else None)


def _spans(members: list[TarMember | None]) -> tuple[Int64[np.ndarray, "samples"], Int64[np.ndarray, "samples"]]:
    spans = [(member.offset, member.size) if member else (0, 0) for member in members]
    offset, size = np.array(spans, np.int64).reshape(-1, 2).T.copy()
    return offset, size
