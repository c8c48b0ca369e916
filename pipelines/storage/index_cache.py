"""Indexes kept on disk: a shard's headers are read once, and again only when the shard has changed.

An index lies beside its shard, `train-000000.tar.index`; where that folder cannot be written, and for remote shards, in
a cache folder (IWM_CACHE, otherwise ~/.cache/iwm-fast). It holds for the size and time of change that the shard had
when its headers were read. What is not whole, or of another format, counts as absent and is made anew.
"""

import hashlib
import json
import logging
import os
import time
import zlib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from iwm_fast.pipelines.storage.remote_file import file_info
from iwm_fast.pipelines.storage.shard import Shard, index_shard

log = logging.getLogger(__name__)

# changes with the meaning of what is kept
FORMAT = 2
# a shard changed as lately as this may change again without showing it: file systems count time in steps
MIN_AGE_NS = 2_000_000_000
_NUMBERS = ("image_offset", "image_size", "label", "json_offset", "json_size", "mask_offset", "mask_size")


class FileVersion(NamedTuple):
    """What tells that a shard is still the one that was indexed."""

    size_bytes: int
    changed_ns: int


def load_or_index(path: str) -> Shard:
    """Return a shard's index: the kept one if it still holds, otherwise a new one, which is kept.

    Raises:
        ShardError: if the shard has to be read and cannot be used.
    """
    # before the headers: should the shard change meanwhile, the new index is out of date and not wrong
    stamp = file_version(path)
    places = _places(path)
    kept = [shard for shard in (_read(place, path, stamp) for place in places) if shard is not None]
    if kept:
        # of two, one was made where the other could not be replaced: whoever checked the shard knows more
        return max(kept, key=lambda shard: shard.num_left_out)
    shard = index_shard(path)
    if time.time_ns() - stamp.changed_ns >= MIN_AGE_NS:
        _keep(shard, stamp, places)
    return shard


def save_filtered_index(shard: Shard, stamp: FileVersion, positions: list[int]) -> None:
    """Keep an index without the samples at these positions; it holds until the shard changes.

    Args:
        shard: whole, as `index_shard` read it.
        stamp: the shard's, from before it was read.
        positions: what to leave out; not everything.

    Raises:
        OSError: if what is left out would be drawn all the same, because no index can be kept.
    """
    kept = np.delete(np.arange(len(shard.keys)), positions)
    numbers = {name: getattr(shard, name)[kept] for name in _NUMBERS}
    keys = tuple(shard.keys[position] for position in kept)
    # what was left out once must not come back because the shard is young
    time.sleep(max(0, stamp.changed_ns + MIN_AGE_NS - time.time_ns()) / 1e9)
    places = _places(shard.path)
    _keep(replace(shard, keys=keys, num_left_out=len(positions), **numbers), stamp, places)
    # read back as a run will: a store may tell no time of change, the shard may have changed meanwhile
    read = [_read(place, shard.path, file_version(shard.path)) for place in places]
    if positions and max((found.num_left_out for found in read if found), default=0) != len(positions):
        folders = " or ".join(str(place.parent) for place in places)
        raise OSError(
            f"{shard.path}: {len(positions)} samples cannot be decoded and would still be drawn, as no index without "
            f"them can be kept in {folders}; set IWM_CACHE to a folder that can be written, and leave the shard as it "
            "is while it is checked"
        )


def file_version(path: str) -> FileVersion:
    """Return what the shard looks like from outside."""
    if "://" in path:
        info = file_info(path)
        # a store that tells no time of change keeps no index: it would never be known to be out of date
        return FileVersion(int(info.size or 0), int(info.mtime_ns or time.time_ns()))
    status = os.stat(path)
    return FileVersion(status.st_size, status.st_mtime_ns)


def _places(path: str) -> list[Path]:
    """Return where an index may lie, the best first."""
    name = hashlib.sha256((path if "://" in path else os.path.realpath(path)).encode()).hexdigest()[:32]
    folder = Path(os.environ.get("IWM_CACHE") or Path.home() / ".cache" / "iwm-fast") / "index"
    beside = [] if "://" in path else [Path(f"{path}.index")]
    return [*beside, folder / f"{name}.index"]


def _read(place: Path, path: str, stamp: FileVersion) -> Shard | None:
    if not place.is_file():
        return None
    try:
        with safe_open(place, framework="numpy") as file:
            about = json.loads((file.metadata() or {}).get("about", "{}"))
            if about.get("format") != FORMAT or tuple(about["stamp"]) != stamp:
                return None
            arrays = {name: file.get_tensor(name) for name in ("keys", "key_size", *_NUMBERS)}
            checksum, num_left_out = about["checksum"], int(about["num_left_out"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        log.warning("%s is no whole index (%s); it is made anew", place, error)
        return None
    if checksum != _checksum(arrays):
        log.warning("%s is damaged; it is made anew", place)
        return None
    bounds, text = [0, *arrays["key_size"].cumsum().tolist()], arrays["keys"].tobytes()
    keys = (text[begin:end].decode("utf-8", "surrogateescape") for begin, end in pairwise(bounds))
    numbers = {name: arrays[name] for name in _NUMBERS}
    return Shard(path=path, size_bytes=stamp.size_bytes, keys=tuple(keys), num_left_out=num_left_out, **numbers)


def _keep(shard: Shard, stamp: FileVersion, places: list[Path]) -> None:
    keys = [key.encode("utf-8", "surrogateescape") for key in shard.keys]
    arrays = {name: np.ascontiguousarray(getattr(shard, name)) for name in _NUMBERS}
    arrays["keys"] = np.frombuffer(b"".join(keys), np.uint8)
    arrays["key_size"] = np.array([len(key) for key in keys], np.int64)
    about = {
        "format": FORMAT,
        "stamp": stamp,
        "num_left_out": shard.num_left_out,
        "checksum": _checksum(arrays),
    }
    content = save(arrays, {"about": json.dumps(about)})
    errors = []
    for place in places:
        try:
            return _publish(place, content)
        except OSError as error:
            errors.append(str(error))
    log.warning("the index of %s cannot be kept and will be made again next time: %s", shard.path, "; ".join(errors))


def _publish(place: Path, content: bytes) -> None:
    """Write a file that is whole or not there, whoever is killed or writes the same at the same time."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.{time.monotonic_ns()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(place)
    finally:
        temporary.unlink(missing_ok=True)


def _checksum(arrays: dict[str, np.ndarray]) -> int:
    checksum = 0
    for name in sorted(arrays):
        checksum = zlib.crc32(arrays[name].tobytes(), checksum)
    return checksum
