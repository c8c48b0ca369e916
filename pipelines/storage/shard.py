"""The samples of a shard, read from its tar headers: their keys, labels and the byte ranges of their files."""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, overload

import numpy as np
from jaxtyping import Int64, UInt8

from iwm_fast.pipelines.config import IMAGE_EXTENSIONS
from iwm_fast.pipelines.errors import EmptyShardError, ShardError, printable
from iwm_fast.pipelines.storage.tar_reader import HeaderWindow, ShardFile, TarMember, tar_members

# Top-level members such as __meta__ or __meta__/note.txt hold metadata, not samples (webdataset.tariterators).
_METADATA = re.compile(r"__[^/]*__($|/)")
# A .png next to another image is its segmentation map, so .png is the last choice.
_IMAGE_ORDER = sorted(IMAGE_EXTENSIONS, key=lambda extension: extension == "png")
# More digits than any int64 has, and few enough to be read together with the headers.
_MAX_LABEL_BYTES = 32

# What may be in a shard without being part of a sample, for one and for several.
_UNUSED_KINDS = {
    "extension": ("member has an extension that is not read", "members have an extension that is not read"),
    "no image": ("key has no image", "keys have no image"),
    "further image": ("image is a further one of its sample", "images are further ones of their samples"),
    "link": ("link or special file is not followed", "links and special files are not followed"),
    "no extension": ("file has no extension", "files have no extension"),
    "hidden": ("hidden file is not read", "hidden files are not read"),
    "label": (".cls member holds no class number", ".cls members hold no class number"),
}


INTEGER_FIELDS = ("image_offset", "image_size", "label", "json_offset", "json_size", "mask_offset", "mask_size")
"""Fields of `Shard` that hold an integer for each sample."""


class StoredStrings(Sequence[str]):
    """Strings that are stored one after the other as bytes and decoded when they are asked for.

    Names in a tar are bytes. surrogateescape keeps those that are not UTF-8.
    """

    def __init__(self, bounds: Int64[np.ndarray, "bounds"], content: UInt8[np.ndarray, "_"]) -> None:
        """Set where each string begins in `content`, followed by the end of the last one."""
        self.bounds = bounds
        self._content = content

    @staticmethod
    def of(texts: Sequence[str]) -> "StoredStrings":
        """Return the same strings, stored."""
        if isinstance(texts, StoredStrings):
            return texts
        encoded = [text.encode("utf-8", "surrogateescape") for text in texts]
        bounds = np.cumsum([0, *map(len, encoded)], dtype=np.int64)
        return StoredStrings(bounds, np.frombuffer(b"".join(encoded), np.uint8))

    @property
    def content(self) -> UInt8[np.ndarray, "_"]:
        """The bytes of all strings."""
        return self._content[int(self.bounds[0]) : int(self.bounds[-1])]

    @property
    def lengths(self) -> Int64[np.ndarray, "strings"]:
        """Number of bytes of each string."""
        return np.diff(self.bounds)

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredStrings": ...
    def __getitem__(self, index: int | slice) -> "str | StoredStrings":
        if isinstance(index, slice):
            begin, end, _ = index.indices(len(self))
            return StoredStrings(self.bounds[begin : max(begin, end) + 1], self._content)
        position = range(len(self))[index]
        begin, end = self.bounds[position : position + 2].tolist()
        return self._content[begin:end].tobytes().decode("utf-8", "surrogateescape")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    __hash__ = None  # pyright: ignore[reportAssignmentType]


class Unused(NamedTuple):
    """Members of one kind that no sample uses."""

    number: int
    first: str
    """Name of the first one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shard:
    """Index of a tar archive: its samples and the byte ranges of their files, in the order of the archive."""

    path: str
    size_bytes: int
    keys: Sequence[str]
    """Key of each sample: the path of its members up to the first dot of the file name."""
    image_offset: Int64[np.ndarray, "samples"]
    """Offset of each encoded image in the archive, in bytes."""
    image_size: Int64[np.ndarray, "samples"]
    """Size of each encoded image in bytes. A size of 0 is accepted here; decoding then reports a bad sample."""
    label: Int64[np.ndarray, "samples"]
    """Class number of each sample from its `.cls` member, -1 if it has none or the member holds something else."""
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
    unused: dict[str, Unused] = field(default_factory=dict)
    """Members that no sample uses, by kind; `describe_unused` puts them into words."""
    is_checked: bool = False
    """Whether `iwm shards check` has decoded all samples that are listed."""


@dataclass(kw_only=True)
class _Sample:
    """A sample whose members are being collected."""

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    label: int = -1


def index_shard(path: str, image: str = "") -> Shard:
    """Index a shard by reading its headers and labels.

    Args:
        path: the shard.
        image: extension of the member that is the image, as in `data.image`; empty: the usual extensions.

    Raises:
        EmptyShardError: if the archive holds no image.
        ShardError: if it is damaged, repeats a key, or has a sample that cannot be used.
    """
    unused: dict[str, Unused] = {}
    with ShardFile(path) as file:
        samples = list(_group_members(HeaderWindow(file), unused))
        size_bytes = file.size_bytes
    order = [image.lower()] if image else _IMAGE_ORDER
    images = [next((sample.members[name] for name in order if name in sample.members), None) for sample in samples]
    # Keys without an image, such as a README, are not samples.
    pairs = [(sample, image) for sample, image in zip(samples, images, strict=True) if image is not None]
    if not pairs:
        raise _empty_shard(path, samples, image)
    for sample, chosen in zip(samples, images, strict=True):
        _count_unused_members(sample, chosen, unused, is_image_chosen=bool(image))
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
        unused=unused,
    )


def describe_unused(shards: Iterable[tuple[str, dict[str, Unused]]]) -> list[str]:
    """Return one line for each kind of members that no sample uses, over all shards, given by path and `unused`."""
    totals: dict[str, Unused] = {}
    for path, unused in shards:
        for kind, (count, first) in unused.items():
            _count(totals, kind, f"{first} in {path}", count)
    return [
        printable(f"{total.number} {_UNUSED_KINDS[kind][total.number > 1]}, the first is {total.first}")
        for kind, total in totals.items()
    ]


def read_cls_member(shard: Shard, key: str) -> bytes | None:
    """Return the beginning of a sample's `.cls` member, None if it has none; for messages, as it reads all headers."""
    with ShardFile(shard.path) as file:
        window = HeaderWindow(file)
        for member in tar_members(window):
            if member.is_file and parse_member_name(member.name) == (key, "cls"):
                return window.read_at(member.offset, min(member.size, _MAX_LABEL_BYTES + 1))
    return None


def limit_samples(shard: Shard, count: int) -> Shard:
    """Return a copy of the index that lists only the first `count` samples."""
    return replace(shard, **{name: getattr(shard, name)[:count] for name in ("keys", *INTEGER_FIELDS)})


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


def _group_members(window: HeaderWindow, unused: dict[str, Unused]) -> Iterator[_Sample]:
    """Yield the samples, each a run of consecutive members with the same key, with their labels; count the rest."""
    seen: set[str] = set()
    current = _Sample(key="")
    for member in tar_members(window):
        parsed = parse_member_name(member.name)
        if parsed is None or not member.is_file:
            _count_other_member(member, unused)
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
            current.label = _parse_label(content)
            if current.label < 0:
                _count(unused, "label", f"{member.name} ({content!r})")
    if current.key:
        yield current


def _count(unused: dict[str, Unused], kind: str, first: str, count: int = 1) -> None:
    earlier = unused.get(kind, Unused(0, first))
    unused[kind] = Unused(earlier.number + count, earlier.first)


def _count_other_member(member: TarMember, unused: dict[str, Unused]) -> None:
    """Count a member that has no key, or no content of its own."""
    base = member.name.rpartition("/")[2]
    if not member.is_file:
        _count(unused, "link", member.name)
    elif not _METADATA.match(member.name):
        _count(unused, "hidden" if base.startswith(".") else "no extension", member.name)


def _count_unused_members(
    sample: _Sample, image: TarMember | None, unused: dict[str, Unused], *, is_image_chosen: bool
) -> None:
    """Count the members of a key that look like an image or a label, but are not read."""
    is_named = False
    # Whoever chooses one of several images knows that the others are not read.
    for extension, member in () if is_image_chosen else sample.members.items():
        last = extension.rpartition(".")[2]
        if extension == "seg.png" or last not in (*IMAGE_EXTENSIONS, "cls") or extension in ("cls", "png"):
            continue
        if last != extension:
            _count(unused, "extension", member.name)
            is_named = True
        elif member is not image:
            _count(unused, "further image", member.name)
    if image is None and not is_named:
        _count(unused, "no image", next(iter(sample.members.values())).name)


def _empty_shard(path: str, samples: list[_Sample], image: str) -> EmptyShardError:
    extensions = sorted({extension for sample in samples for extension in sample.members})
    problem = f"holds no image: the extensions of its members are {extensions[:20] or 'none'}"
    if image:
        return EmptyShardError(problem, shard=path, remedy=f"data.image={image} reads only members of this extension")
    remedy = f"accepted extensions are {', '.join(IMAGE_EXTENSIONS)}"
    other = next((name for name in extensions if name.rpartition(".")[2] in IMAGE_EXTENSIONS), "")
    remedy += f"; set data.image={other} to read these members" if other else ""
    return EmptyShardError(problem, shard=path, remedy=remedy)


def _parse_label(content: bytes) -> int:
    """Return the class number that a `.cls` member holds, -1 for any other content."""
    digits = content.strip()
    # Longer content was not read completely. isdigit() of bytes accepts only ASCII digits, without a sign.
    is_number = len(content) <= _MAX_LABEL_BYTES and digits.isdigit() and int(digits) < 2**63
    return int(digits) if is_number else -1


def _mask_member(sample: _Sample, image: TarMember) -> TarMember | None:
    png = sample.members.get("png")
    return sample.members.get("seg.png") or (png if png is not image else None)


def _byte_ranges(members: list[TarMember | None]) -> tuple[Int64[np.ndarray, "samples"], Int64[np.ndarray, "samples"]]:
    """Return offset and size of each member, both 0 for None. No content has offset 0, where the first header is."""
    ranges = [(member.offset, member.size) if member else (0, 0) for member in members]
    # The copy makes both rows contiguous.
    offset, size = np.array(ranges, np.int64).reshape(-1, 2).T.copy()
    return offset, size
