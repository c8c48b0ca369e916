"""Indexes stored on disk: a shard's headers are read once, and again only after the shard has changed.

An index lies next to its shard, as `train-000000.tar.index`, or `train-000000.tar.left.jpg.index` for the images that
`data.image=left.jpg` chooses. For remote shards, and where the shard's folder is not
writable, it lies in a cache folder (IWM_CACHE, by default ~/.cache/iwm-fast). It is valid for the size and modification
time that the shard had when its headers were read. A damaged index, or one of another format, is rebuilt.
"""

import hashlib
import json
import logging
import os
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from iwm_fast.pipelines.errors import EmptyShardError, printable
from iwm_fast.pipelines.storage.atomic import replace_file
from iwm_fast.pipelines.storage.remote_file import file_info
from iwm_fast.pipelines.storage.shard import INTEGER_FIELDS, Shard, StoredStrings, Unused, index_shard

log = logging.getLogger(__name__)

# To be increased when the meaning of the stored values changes.
FORMAT = 3
# File systems record times in steps, at most 2 s in common ones (FAT). A shard that changed more recently than that may
# change again without a new modification time, so its index is not stored yet.
MIN_AGE_NS = 2_000_000_000


class FileVersion(NamedTuple):
    """Size and modification time of a file, which tell whether it has changed."""

    size_bytes: int
    changed_ns: int


def load_or_index(path: str, image: str = "") -> Shard:
    """Return a shard's stored index if it is still valid; otherwise index the shard and store the result.

    Args:
        path: the shard.
        image: extension of the member that is the image, as in `data.image`; empty: the usual extensions.

    Raises:
        EmptyShardError: if it holds no image, or the stored index leaves out all samples.
        ShardError: if the shard must be indexed and cannot be used.
    """
    # Taken before the headers are read: if the shard changes in between, the stored index is outdated, but never wrong.
    version = file_version(path)
    index_paths = _index_paths(path, image)
    indexes = [_read_index(index_path, path, version) for index_path in index_paths]
    valid = [shard for shard in indexes if shard is not None]
    if valid:
        # There are two if a filtered index could not replace the older one. The filtered index leaves out more samples.
        shard = max(valid, key=lambda shard: (shard.num_left_out, shard.is_checked))
        if not shard.keys:
            problem = f"none of its {shard.num_left_out} samples could be decoded by iwm shards check"
            raise EmptyShardError(problem, shard=path, remedy="write the shard again")
        return shard
    shard = index_shard(path, image)
    if time.time_ns() - version.changed_ns >= MIN_AGE_NS:
        _write_index(shard, version, index_paths)
    return shard


def save_filtered_index(shard: Shard, version: FileVersion, positions: list[int], image: str = "") -> None:
    """Store an index without the samples at `positions`; it is valid until the shard changes.

    Args:
        shard: with all samples, as `index_shard` returns it.
        version: the shard's version before it was read.
        positions: the samples to leave out.
        image: extension of the member that is the image, as the shard was indexed with.

    Raises:
        OSError: if no index can be stored, so that the samples to leave out would still be drawn.
    """
    # Until the shard is old enough, its index, and with it the list of bad samples, could not be stored.
    wait_ns = version.changed_ns + MIN_AGE_NS - time.time_ns()
    if wait_ns > MIN_AGE_NS:
        problem = (
            f"the modification time of {printable(shard.path)} lies {(wait_ns - MIN_AGE_NS) / 1e9:,.0f} s in the "
            "future, so that a change of it could go unnoticed and the result of the check cannot be stored; run "
            "`touch` on it, and check it again"
        )
        if positions:
            raise OSError(f"{problem}: {len(positions)} samples cannot be decoded and would still be drawn")
        log.warning("%s", problem)
        return
    time.sleep(max(0, wait_ns) / 1e9)
    remaining = np.delete(np.arange(len(shard.keys)), positions)
    arrays = {name: getattr(shard, name)[remaining] for name in INTEGER_FIELDS}
    keys = tuple(shard.keys[position] for position in remaining.tolist())
    index_paths = _index_paths(shard.path, image)
    checked = replace(shard, keys=keys, num_left_out=len(positions), is_checked=True, **arrays)
    _write_index(checked, version, index_paths)
    # Read it back as a run will: the store may report no modification time, or the shard may have changed meanwhile.
    stored = [_read_index(index_path, shard.path, file_version(shard.path)) for index_path in index_paths]
    if positions and max((index.num_left_out for index in stored if index), default=0) != len(positions):
        folders = " or ".join(str(index_path.parent) for index_path in index_paths)
        raise OSError(
            f"{shard.path}: {len(positions)} samples cannot be decoded and would still be drawn, because no index "
            f"without them can be stored in {folders}; set IWM_CACHE to a writable folder, and do not change the shard "
            "while it is being checked"
        )


def file_version(path: str) -> FileVersion:
    """Return size and modification time of a local or remote file."""
    if "://" in path:
        info = file_info(path)
        # Without a modification time a change could go unnoticed. The current time makes every index look outdated.
        return FileVersion(int(info.size or 0), int(info.mtime_ns or time.time_ns()))
    status = os.stat(path)
    return FileVersion(status.st_size, status.st_mtime_ns)


def cache_folder() -> Path:
    """Return the folder for indexes that cannot lie next to their shards."""
    return Path(os.environ.get("IWM_CACHE") or Path.home() / ".cache" / "iwm-fast") / "index"


def real_paths(paths: Sequence[str]) -> list[str]:
    """Return the paths of files without symbolic links; remote addresses stay as they are."""
    # Most shards share their folder, and realpath looks at each part of a path.
    folders = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
    real = []
    for path in paths:
        folder, name = os.path.split(path)
        is_simple = not os.path.islink(path) and name not in (".", "..")
        real.append(
            path if "://" in path else os.path.join(folders[folder], name) if is_simple else os.path.realpath(path)
        )
    return real


def index_stamps(paths: Sequence[str], image: str) -> list[tuple[int, ...]]:
    """Return, for each shard, what tells whether a stored index of it has been replaced; an empty tuple if it has none.

    `iwm shards check` replaces the index of a shard that itself stays the same.
    """
    cache, stamps = str(cache_folder()), []
    for path, real_path in zip(paths, real_paths(paths), strict=True):
        stamp: list[int] = []
        for index_path in _index_names(path, real_path, image, cache):
            with suppress(OSError):
                status = os.stat(index_path)
                stamp += [status.st_size, status.st_mtime_ns, status.st_ino]
        stamps.append(tuple(stamp))
    return stamps


def _index_paths(path: str, image: str) -> list[Path]:
    """Return the paths at which a shard's index may be stored, the preferred one first."""
    return [Path(name) for name in _index_names(path, real_paths([path])[0], image, str(cache_folder()))]


def _index_names(path: str, real_path: str, image: str, cache: str) -> list[str]:
    # Each choice of images has its own index, because other samples may be left out of it.
    ending = f".{image.lower()}.index" if image else ".index"
    name = hashlib.sha256(real_path.encode("utf-8", "surrogateescape")).hexdigest()[:32]
    beside = [] if "://" in path else [f"{path}{ending}"]
    return [*beside, os.path.join(cache, f"{name}{ending}")]


def _read_index(index_path: Path, path: str, version: FileVersion) -> Shard | None:
    """Return the stored index of the shard at `path`, None if it is absent, outdated or damaged."""
    if not index_path.is_file():
        return None
    try:
        with safe_open(index_path, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            if about.get("format") != FORMAT or tuple(about["stamp"]) != version:
                return None
            arrays = {name: file.get_tensor(name) for name in ("keys", "key_size", *INTEGER_FIELDS)}
            is_complete = about.pop("checksum") == _checksum(arrays, about)
            counts = {"num_left_out": int(about["num_left_out"]), "is_checked": bool(about["is_checked"])}
            unused = {kind: Unused(*entry) for kind, entry in about["unused"].items()}
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        log.warning("%s is not a complete index (%s); it is rebuilt", printable(str(index_path)), error)
        return None
    if not is_complete:
        log.warning("%s is damaged; it is rebuilt", printable(str(index_path)))
        return None
    keys = StoredStrings(np.append(0, arrays["key_size"].cumsum()), arrays["keys"])
    integers = {name: arrays[name] for name in INTEGER_FIELDS}
    return Shard(path=path, size_bytes=version.size_bytes, keys=keys, unused=unused, **counts, **integers)


def _write_index(shard: Shard, version: FileVersion, index_paths: list[Path]) -> None:
    """Write an index to the first of the paths that is writable; log a warning if none is."""
    keys = StoredStrings.of(shard.keys)
    arrays = {name: np.ascontiguousarray(getattr(shard, name)) for name in INTEGER_FIELDS}
    arrays |= {"keys": keys.content, "key_size": keys.lengths}
    about = {
        "format": FORMAT,
        "stamp": version,
        "num_left_out": shard.num_left_out,
        "is_checked": shard.is_checked,
        "unused": shard.unused,
    }
    content = save(arrays, {"about": json.dumps(about | {"checksum": _checksum(arrays, about)})})
    errors = []
    for index_path in index_paths:
        try:
            index_path.parent.mkdir(parents=True, exist_ok=True)
            return replace_file(index_path, lambda draft: draft.write_bytes(content))
        except OSError as error:
            errors.append(str(error))
    log.warning(
        "the index of %s cannot be stored and will be rebuilt next time: %s", printable(shard.path), "; ".join(errors)
    )


def _checksum(arrays: dict[str, np.ndarray], about: dict[str, Any]) -> int:
    checksum = zlib.crc32(json.dumps(about, sort_keys=True).encode())
    # Sorted, because writing and reading build the dictionary in different orders.
    for name in sorted(arrays):
        checksum = zlib.crc32(arrays[name].tobytes(), checksum)
    return checksum
