"""Find shards and describe the whole as one numbered set of samples."""

import glob
import hashlib
import logging
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from braceexpand import braceexpand
from jaxtyping import Int64
from pyarrow.fs import FileType

from iwm_fast.pipelines.config import check
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.index_cache import load_or_index
from iwm_fast.pipelines.storage.remote_file import file_info, list_files
from iwm_fast.pipelines.storage.shard import Shard, first_samples

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardSet:
    """Several shards in a fixed order; their samples are numbered through from 0."""

    shards: tuple[Shard, ...]

    @cached_property
    def first_sample(self) -> Int64[np.ndarray, "bounds"]:
        """Number of each shard's first sample, and the number of all samples at the end."""
        return np.cumsum([0, *(len(shard.keys) for shard in self.shards)], dtype=np.int64)

    @property
    def num_samples(self) -> int:
        """Samples of all shards together."""
        return int(self.first_sample[-1])

    @cached_property
    def _label(self) -> Int64[np.ndarray, "samples"]:
        return np.concatenate([shard.label for shard in self.shards])

    def truncated(self, num_samples: int) -> "ShardSet":
        """Return the set of the first so many samples, in the order of the shards.

        Raises:
            ValueError: if there are fewer, or it asks for none.
        """
        check(1 <= num_samples <= self.num_samples, "num_samples", num_samples, f"lie in 1 .. {self.num_samples}")
        num_shards = int(np.searchsorted(self.first_sample, num_samples))
        whole, last = self.shards[: num_shards - 1], self.shards[num_shards - 1]
        return ShardSet(shards=(*whole, first_samples(last, num_samples - int(self.first_sample[num_shards - 1]))))

    def locate(self, samples: Int64[np.ndarray, "B"]) -> tuple[Int64[np.ndarray, "B"], Int64[np.ndarray, "B"]]:
        """Return each sample's shard number and its position in that shard.

        Raises:
            IndexError: if a number is outside the set.
        """
        outside = samples[(samples < 0) | (samples >= self.num_samples)]
        if len(outside):
            raise IndexError(f"samples must lie in 0 .. {self.num_samples - 1}, got {outside[0]}")
        shard = np.searchsorted(self.first_sample, samples, side="right").astype(np.int64) - 1
        return shard, samples - self.first_sample[shard]

    def shard_of(self, sample: int) -> tuple[Shard, int]:
        """Return one sample's shard and its position in that."""
        (number,), (position,) = self.locate(np.array([sample], np.int64))
        return self.shards[int(number)], int(position)

    def key(self, sample: int) -> str:
        """Return the sample's name, unique within its shard."""
        shard, position = self.shard_of(sample)
        return shard.keys[position]

    def where(self, sample: int) -> dict[str, str]:
        """Return shard path and key, as `ShardError` takes them."""
        shard, position = self.shard_of(sample)
        return {"shard": shard.path, "key": shard.keys[position]}

    def address(self, sample: int) -> str:
        """Return shard path and key, joined by a colon, for messages and logs."""
        shard, position = self.shard_of(sample)
        return f"{shard.path}:{shard.keys[position]}"

    def labels(self, samples: Int64[np.ndarray, "B"]) -> Int64[np.ndarray, "B"]:
        """Return the class numbers, -1 where a sample has none."""
        return self._label[samples]

    def require_labels(self, why: str) -> None:
        """Check that every sample has a label; `why` says who needs it.

        Raises:
            ShardError: naming the first sample without one.
        """
        missing = np.flatnonzero(self._label < 0)
        if len(missing):
            what = f"has no label, like {len(missing)} of {self.num_samples} samples, and {why} needs one for each"
            remedy = "add a .cls member with the class number to each sample"
            raise ShardError(what, **self.where(int(missing[0])), remedy=remedy)

    @cached_property
    def content_digest(self) -> str:
        """SHA-256 over keys, image sizes and labels, shard by shard: the same data elsewhere has the same digest."""
        digest = hashlib.sha256()
        for shard in self.shards:
            keys = [key.encode("utf-8", "surrogateescape") for key in shard.keys]
            # lengths first, so that no two lists of keys read the same
            for numbers in ([len(keys)], [len(key) for key in keys], shard.image_size, shard.label):
                digest.update(np.asarray(numbers, "<i8").tobytes())
            digest.update(b"".join(keys))
        return digest.hexdigest()


def open_shards(spec: str, num_threads: int = 8) -> ShardSet:
    """Find the shards that `spec` describes (see `find_shards`) and index them in threads.

    Raises:
        ValueError, FileNotFoundError: as `find_shards`.
        ShardError: if one of them cannot be used.
    """
    paths = find_shards(spec)
    with ThreadPoolExecutor(num_threads, thread_name_prefix="index") as pool:
        shards = tuple(pool.map(load_or_index, paths))
    num_left_out = sum(shard.num_left_out for shard in shards)
    if num_left_out:
        log.warning("%s: %d samples are left out, as iwm shards check found they cannot be decoded", spec, num_left_out)
    return ShardSet(shards=shards)


def find_shards(spec: str) -> list[str]:
    """Return the shard paths that a pattern stands for, in its order.

    `spec` is one or several parts joined by "::". A part is a file, a folder (all its .tar files by name), or a remote
    address such as s3://bucket/folder; braces like {000..127} expand, and * and ? match in local paths.

    Raises:
        ValueError: if the pattern is empty, malformed, or names a file twice.
        FileNotFoundError: if something it names does not exist or a folder holds no .tar file.
    """
    parts = [part.strip() for part in spec.split("::")]
    if not all(parts):
        raise ValueError(f"shard pattern must name files, folders or addresses joined by '::', got {spec!r}")
    names = [name for part in parts for name in _expand(part)]
    # threads, because each remote name costs a request
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(_list_shards, names))
    missing = [name for name, paths in zip(names, found, strict=True) if not paths]
    if missing:
        what = f"{len(missing)} of {len(names)} names do not exist, the first is {missing[0]}"
        raise FileNotFoundError(f"shard pattern {spec!r}: {what}; correct the pattern or its range in braces")
    paths = [path for group in found for path in group]
    count = Counter(path if "://" in path else os.path.realpath(path) for path in paths)
    twice = [path for path, times in count.items() if times > 1]
    if twice:
        raise ValueError(
            f"shard pattern {spec!r} names {len(twice)} shards twice, the first is {twice[0]}; name each once"
        )
    return paths


def _expand(part: str) -> list[str]:
    part = part if "://" in part else os.path.expanduser(part)
    # a path that exists is meant literally, whatever characters it holds
    if os.path.exists(part):
        return [part]
    try:
        return list(braceexpand(part))
    except ValueError as error:
        raise ValueError(f"shard pattern {part!r}: {error}") from error


def _list_shards(name: str) -> list[str]:
    """Return the shards that one expanded name stands for, none if it does not exist."""
    if "://" in name:
        return _list_remote(name)
    if os.path.isdir(name):
        inside = (entry for entry in sorted(os.listdir(name)) if entry.endswith(".tar") and not entry.startswith("."))
        return _require_some([os.path.join(name, entry) for entry in inside], name)
    if os.path.exists(name):
        return [name]
    # only * and ? are patterns here: [ ] are common in folder names
    return sorted(glob.glob(name.replace("[", "[[]"))) if "*" in name or "?" in name else []


def _list_remote(uri: str) -> list[str]:
    kind = file_info(uri).type
    if kind != FileType.Directory:
        return [uri] if kind == FileType.File else []
    inside = (entry for entry in list_files(uri) if entry.endswith(".tar") and not entry.startswith("."))
    return _require_some([f"{uri.rstrip('/')}/{entry}" for entry in inside], uri)


def _require_some(paths: list[str], folder: str) -> list[str]:
    if not paths:
        raise FileNotFoundError(
            f"folder {folder} holds no .tar file; make shards with iwm_fast.pipelines.storage.shard_writer"
        )
    return paths
