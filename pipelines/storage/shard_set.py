"""Find shards and number their samples as one set."""

import fnmatch
import glob
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64
from pyarrow.fs import FileType

from iwm_fast.pipelines.config import MAX_PIXELS
from iwm_fast.pipelines.errors import ShardError, printable
from iwm_fast.pipelines.storage.dataset_cache import open_index
from iwm_fast.pipelines.storage.dataset_index import ContentDigest, DatasetIndex, map_index
from iwm_fast.pipelines.storage.index_cache import real_paths
from iwm_fast.pipelines.storage.remote_file import file_info, list_files
from iwm_fast.pipelines.storage.shard import Shard, limit_samples, read_cls_member

log = logging.getLogger(__name__)

# Shards that a thread looks at in one go.
_CHUNK = 256


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardSet:
    """Shards in a fixed order, whose samples are numbered consecutively from 0.

    A set is pickled as the path of its index, which another process on this machine maps. On another machine, where
    that file is not, the same names of shards are opened and must have the same content.
    """

    index: DatasetIndex
    num_samples: int
    """Number of samples in all shards: the first ones of the index."""
    spec: str
    """Pattern that names the shards."""
    image: str = ""
    """Extension of the member that is the image; empty: the usual extensions."""
    max_pixels: int = MAX_PIXELS
    """Largest number of pixels of an image or a segmentation map; larger ones are not decoded (data.max_pixels)."""
    source_shards: tuple[int, ...] = ()
    """Number of shards of each source of a mixture, one source after the other; empty if it is none."""

    @cached_property
    def shard_bounds(self) -> Int64[np.ndarray, "bounds"]:
        """Number of each shard's first sample, followed by the total number of samples."""
        bounds = self.index.shard_bounds
        if self.num_samples == bounds[-1]:
            return bounds
        return np.append(bounds[: np.searchsorted(bounds, self.num_samples)], self.num_samples)

    @property
    def shards(self) -> Sequence[Shard]:
        """The shards, which are read from the index when they are asked for."""
        return _Shards(self)

    @cached_property
    def is_checked(self) -> Bool[np.ndarray, "shards"]:
        """Whether `iwm shards check` has decoded all samples of each shard."""
        return self.index.columns["is_checked"][: len(self.shard_bounds) - 1] > 0

    @property
    def paths(self) -> Sequence[str]:
        """Path of each shard."""
        return self.index.paths[: len(self.shard_bounds) - 1]

    @property
    def all_labels(self) -> Int64[np.ndarray, "samples"]:
        """Class number of each sample, -1 for a sample without one; read-only, in memory that processes share."""
        return self.index.columns["label"][: self.num_samples]

    @cached_property
    def num_unlabelled(self) -> int:
        """Number of samples without a class number."""
        is_complete = self.num_samples == self.index.shard_bounds[-1]
        return self.index.num_unlabelled if is_complete else int((self.all_labels < 0).sum())

    def truncated(self, num_samples: int) -> "ShardSet":
        """Return the set of the first `num_samples` samples, in the order of the shards.

        Raises:
            ValueError: if `num_samples` is not positive or exceeds the number of samples.
        """
        if not 1 <= num_samples <= self.num_samples:
            raise ValueError(f"num_samples must be in 1 .. {self.num_samples}, got {num_samples}")
        return replace(self, num_samples=num_samples)

    def locate(self, samples: Int64[np.ndarray, "B"]) -> tuple[Int64[np.ndarray, "B"], Int64[np.ndarray, "B"]]:
        """Return each sample's shard number and its position within that shard.

        Raises:
            IndexError: if a sample number is outside the set.
        """
        outside = samples[(samples < 0) | (samples >= self.num_samples)]
        if len(outside):
            raise IndexError(f"sample numbers must be in 0 .. {self.num_samples - 1}, got {outside[0]}")
        shard = np.searchsorted(self.shard_bounds, samples, side="right").astype(np.int64) - 1
        return shard, samples - self.shard_bounds[shard]

    def locate_one(self, sample: int) -> tuple[Shard, int]:
        """Return the shard of a sample and the sample's position within it."""
        (number,), (position,) = self.locate(np.array([sample], np.int64))
        return self.shards[int(number)], int(position)

    def key(self, sample: int) -> str:
        """Return the key of a sample, which is unique within its shard."""
        shard, position = self.locate_one(sample)
        return shard.keys[position]

    def shard_and_key(self, sample: int) -> dict[str, str]:
        """Return shard path and key of a sample as keyword arguments of `ShardError`."""
        shard, position = self.locate_one(sample)
        return {"shard": shard.path, "key": shard.keys[position]}

    def address(self, sample: int) -> str:
        """Return "SHARD:KEY" of a sample, for messages and logs, in printable characters."""
        shard, position = self.locate_one(sample)
        return printable(f"{shard.path}:{shard.keys[position]}")

    def labels(self, samples: Int64[np.ndarray, "B"]) -> Int64[np.ndarray, "B"]:
        """Return the class numbers of samples, -1 for a sample without one."""
        return self.all_labels[samples]

    def require_labels(self, consumer: str) -> None:
        """Check that every sample has a label; the message names `consumer` as what needs them.

        Raises:
            ShardError: naming the first sample without one, and what its `.cls` member holds instead.
        """
        if not self.num_unlabelled:
            return
        shard, position = self.locate_one(int((self.all_labels < 0).argmax()))
        content = read_cls_member(shard, shard.keys[position])
        extent = f"which {consumer} needs ({self.num_unlabelled} of {self.num_samples} samples lack one)"
        if content is None:
            problem, remedy = f"has no label, {extent}", "add a .cls member with the class number to each sample"
        else:
            problem = f"has no class number, {extent}: its .cls must hold an integer >= 0 in digits, got {content!r}"
            remedy = "write class numbers, or write names into .json members and set data.label=json.NAME"
        raise ShardError(problem, shard=shard.path, key=shard.keys[position], remedy=remedy)

    @cached_property
    def content_digest(self) -> str:
        """SHA-256 of keys, image sizes and labels in order; copies of the shards in other paths have the same one."""
        if self.num_samples == self.index.shard_bounds[-1]:
            return self.index.content_digest
        digest = ContentDigest()
        for shard in self.shards:
            digest.add(shard)
        return digest.text()

    @property
    def sources_digest(self) -> str:
        """Digest of the content, and in a mixture of which shards belong to which source."""
        if not self.source_shards:
            return self.content_digest
        return hashlib.sha256(f"{self.content_digest} {self.source_shards}".encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:
        place = (self.index.path, self.index.stamp, self.content_digest)
        names = ("num_samples", "spec", "image", "max_pixels", "source_shards")
        return _reopen, (place, {name: getattr(self, name) for name in names})


class _Shards(Sequence[Shard]):
    """The shards of a set, of which the last one may be cut off."""

    def __init__(self, shards: ShardSet) -> None:
        self._index = shards.index
        self._bounds = shards.shard_bounds

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        number = range(len(self))[index]
        shard, size = self._index.shard(number), int(self._bounds[number + 1] - self._bounds[number])
        return shard if size == len(shard.keys) else limit_samples(shard, size)


def _reopen(place: tuple[str, str, str], values: dict[str, Any]) -> ShardSet:
    """Return a set that was pickled, perhaps on another machine.

    Raises:
        FileNotFoundError, ShardError: if the shards are missing here, or differ.
    """
    path, stamp, content_digest = place
    index = map_index(path, stamp, is_checked=False)
    if index is not None:
        return ShardSet(index=index, **values)
    shards = open_shards(values["spec"], values["image"])
    shards = replace(shards, **values | {"num_samples": min(values["num_samples"], shards.num_samples)})
    if shards.content_digest != content_digest:
        problem = f"{shards.spec} has other samples on this machine than on that of rank 0"
        raise ShardError(problem, remedy="copy the shards of rank 0")
    return shards


def open_shards(spec: str, image: str = "", num_threads: int = 8, *, max_pixels: int = MAX_PIXELS) -> ShardSet:
    """Find the shards that a pattern names and return those with images as one set, opened through its stored index.

    One warning for the complete set names shards without images, samples that are left out, and members that no sample
    uses.

    Args:
        spec: a pattern as in `find_shards`.
        image: extension of the member that is the image, as in `data.image`; empty: the usual extensions.
        num_threads: number of shards that are indexed at a time.
        max_pixels: largest number of pixels of an image that may be decoded.

    Raises:
        ValueError: if the pattern is empty, malformed, or names a file twice.
        FileNotFoundError: if something it names does not exist or a folder holds no .tar file.
        ShardError: if a shard cannot be used, or none of them holds an image.
    """
    index = open_index(find_shards(spec), image, num_threads)
    if index.remarks:
        lines = ["", *index.remarks] if len(index.remarks) > 1 else index.remarks
        log.warning("%s: %s", printable(spec), "\n  ".join(lines))
    return ShardSet(
        index=index, num_samples=int(index.shard_bounds[-1]), spec=spec, image=image, max_pixels=max_pixels
    )  # fmt: skip


def find_shards(spec: str) -> list[str]:
    """Return the paths of the shards that a pattern names, in the order of the pattern.

    `spec` is one or several names joined by "::". A name is a file, a folder (all its .tar files, sorted), or a remote
    address such as s3://bucket/folder. Braces such as {000..127} expand everywhere. * and ? are wildcards in local
    paths, and * in the last part of a remote address whose store can list files.

    Raises:
        ValueError: if the pattern is empty, malformed, or names a file twice.
        FileNotFoundError: if something it names does not exist or a folder holds no .tar file.
    """
    patterns = [pattern.strip() for pattern in spec.split("::")]
    if not all(patterns):
        raise ValueError(f"shard pattern must name files, folders or addresses joined by '::', got {spec!r}")
    names = [name for pattern in patterns for name in _expand(pattern)]
    # In threads, because each remote name costs a request.
    with ThreadPoolExecutor(8) as pool:
        paths_by_name = list(pool.map(_list_shards, names))
    missing = [name for name, paths in zip(names, paths_by_name, strict=True) if not paths]
    if missing and len(names) == 1:
        raise FileNotFoundError(f"no shards match {spec!r}; correct the path, pattern or address")
    if missing:
        problem = f"{len(missing)} of {len(names)} names do not exist, the first is {missing[0]}"
        raise FileNotFoundError(f"shard pattern {spec!r}: {problem}; correct the pattern or its range in braces")
    paths = [path for group in paths_by_name for path in group]
    with ThreadPoolExecutor(8) as pool:
        # In threads as well, because a network file system may take a millisecond for each.
        list(pool.map(_require_files, (paths[first : first + _CHUNK] for first in range(0, len(paths), _CHUNK))))
    # Links to the same file count as the same shard.
    counts = Counter(real_paths(paths))
    repeated = [path for path, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(
            f"shard pattern {spec!r} names {len(repeated)} shards twice, the first is {repeated[0]}; name each one once"
        )
    return paths


def _require_files(paths: Sequence[str]) -> None:
    for path in paths:
        _require_file(path)


def _require_file(path: str) -> None:
    # A pipe would never end, and a link may lead to nothing, as to files of git-annex that are not here.
    if "://" in path or os.path.isfile(path):
        return
    is_link = os.path.islink(path)
    problem = f"is a link to {os.readlink(path)}, where no file is" if is_link else "is a folder or a special file"
    remedy = "run `git annex get` in its repository" if is_link and ".git/annex" in os.readlink(path) else "remove it"
    raise FileNotFoundError(printable(f"shard {path} {problem}; {remedy}, or correct the pattern"))


def _expand(pattern: str) -> list[str]:
    """Expand the braces of a pattern."""
    pattern = pattern if "://" in pattern else os.path.expanduser(pattern)
    # An existing path is literal, even if it contains braces.
    if os.path.exists(pattern):
        return [pattern]
    # Imported here, so that benchmarks without shards start where it is not installed.
    from braceexpand import braceexpand  # noqa: PLC0415

    try:
        return list(braceexpand(pattern))
    except ValueError as error:
        raise ValueError(f"shard pattern {pattern!r}: {error}") from error


def _list_shards(name: str) -> list[str]:
    """Return the shards of an expanded name, none if it does not exist."""
    # Commands, as the webdataset library accepts them, are refused with the remedy.
    if "://" in name or name.startswith("pipe:"):
        return _list_remote(name)
    if os.path.isdir(name):
        # Hidden files are not shards: macOS adds a file ._NAME.tar to each NAME.tar on foreign file systems.
        inside = (entry for entry in sorted(os.listdir(name)) if entry.endswith(".tar") and not entry.startswith("."))
        return _require_some([os.path.join(name, entry) for entry in inside], name)
    if os.path.exists(name):
        return [name]
    # Only * and ? are wildcards. Brackets are escaped, since they are common in folder names.
    return sorted(glob.glob(name.replace("[", "[[]"))) if "*" in name or "?" in name else []


def _list_remote(uri: str) -> list[str]:
    kind = file_info(uri).type
    folder, _, name = uri.rpartition("/")
    if kind == FileType.NotFound and "*" in name:
        # Only * is a wildcard. Brackets are escaped, and ? would begin options, which are refused.
        matching = fnmatch.filter(list_files(folder), name.replace("[", "[[]"))
        return [f"{folder}/{entry}" for entry in matching if not entry.startswith(".")]
    if kind != FileType.Directory:
        return [uri] if kind == FileType.File else []
    inside = (entry for entry in list_files(uri) if entry.endswith(".tar") and not entry.startswith("."))
    return _require_some([f"{uri.rstrip('/')}/{entry}" for entry in inside], uri)


def _require_some(paths: list[str], folder: str) -> list[str]:
    """Return the paths, or raise FileNotFoundError if there are none."""
    if not paths:
        raise FileNotFoundError(
            f"folder {folder} holds no .tar file; pack an image folder into shards with `iwm shards pack`"
        )
    return paths
