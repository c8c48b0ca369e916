"""The index of a data set on disk: built once from the indexes of its shards, and again only after one has changed.

It lies next to the first shard or in the cache folder (see `index_cache`), as `index-DATASET-STAMP.arrow`; the stamp
tells what it was made from. It takes about 80 bytes for each sample and can be deleted while no process uses it.
"""

import hashlib
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

from iwm_fast.pipelines.errors import EmptyShardError, printable
from iwm_fast.pipelines.storage import dataset_index, index_cache
from iwm_fast.pipelines.storage.dataset_index import DatasetIndex, IndexBuilder, map_index
from iwm_fast.pipelines.storage.index_cache import FileVersion, cache_folder, file_version, index_stamps, load_or_index
from iwm_fast.pipelines.storage.shard import Shard, describe_unused

log = logging.getLogger(__name__)

# A process takes a quarter of a second to start, in which it could have indexed about ten shards.
_SHARDS_PER_PROCESS = 32
_THREADS_PER_PROCESS = 4
# Shards that a thread looks at in one go, and that are held in memory while an index is built.
_CHUNK = 256
# Outdated indexes of a data set are removed at this age, because earlier runs may still have mapped them.
_KEPT_S = 30 * 24 * 3600
_INDEX_LISTED = "from iwm_fast.pipelines.storage.dataset_cache import index_listed; index_listed()"


def open_index(paths: Sequence[str], image: str, num_threads: int) -> DatasetIndex:
    """Return the index of a data set: the stored one if it is still valid, otherwise one made from its shards' indexes.

    Args:
        paths: the shards, from `find_shards`.
        image: extension of the member that is the image, as in `data.image`; empty: the usual extensions.
        num_threads: number of shards that are looked at at a time. Shards that have no index yet, if they are many and
            local, are indexed in as many processes as there are cores.

    Raises:
        ShardError: if a shard cannot be used, or none of them holds an image.
        OSError: if a shard cannot be read.
    """
    with ThreadPoolExecutor(num_threads, thread_name_prefix="index") as pool:
        states = _states(paths, image, pool)
        stamp = _stamp(image, states)
        for path in _index_paths(paths, image, stamp):
            index = map_index(str(path), stamp)
            if index is not None:
                return index
        _warn_of_future_times(states)
        unindexed = [state.path for state in states if not state.indexes and "://" not in state.path]
        if _index_in_processes(unindexed, image):
            states = _states(paths, image, pool)
        # Older than what is read now: if a shard changes meanwhile, the index is outdated, but never wrong.
        stamp = _stamp(image, states)
        with IndexBuilder() as builder:
            remarks, empty = _join(_load(paths, image, pool), builder)
            is_settled = all(_is_settled(state) for state in states if state.path not in empty)
            # The index of a shard that has changed was replaced meanwhile, which outdates this one already.
            is_settled = is_settled and _stamp(image, _states(paths, image, pool)) == stamp
            return _save(builder, stamp, remarks, _index_paths(paths, image, stamp) if is_settled else [])


class _State(NamedTuple):
    """What the index of a data set depends on, for a shard."""

    path: str
    version: FileVersion
    indexes: tuple[int, ...]


def _states(paths: Sequence[str], image: str, pool: ThreadPoolExecutor) -> list[_State]:
    def look_at(chunk: Sequence[str]) -> list[_State]:
        return list(map(_State, chunk, map(file_version, chunk), index_stamps(chunk, image)))

    # A remote shard costs a request.
    size = 1 if any("://" in path for path in paths) else _CHUNK
    chunks = [paths[first : first + size] for first in range(0, len(paths), size)]
    return [state for states in pool.map(look_at, chunks) for state in states]


def _is_settled(state: _State) -> bool:
    """Return whether a further change of the shard, or of the index that leaves some of its samples out, will show."""
    # The index of a shard that had none is stored while the index of the data set is made.
    return bool(state.indexes) and time.time_ns() - state.version.changed_ns >= index_cache.MIN_AGE_NS


def _warn_of_future_times(states: Sequence[_State]) -> None:
    future = [state.path for state in states if state.version.changed_ns > time.time_ns()]
    if future:
        text = "the modification times of %d shards lie in the future, the first is %s; until then, indexes of them "
        text += "cannot be stored and are made again at every start: run `touch` on them"
        log.warning(text, len(future), printable(future[0]))


def _stamp(image: str, states: Sequence[_State]) -> str:
    formats = (dataset_index.FORMAT, index_cache.FORMAT)
    return hashlib.sha256(repr((formats, image, states)).encode("utf-8", "surrogateescape")).hexdigest()


def _index_paths(paths: Sequence[str], image: str, stamp: str) -> list[Path]:
    """Return the files in which the index may be stored, the preferred one first."""
    # With the stamp in its name, an outdated index is not replaced: on NFS, another machine's processes that have
    # mapped it would end with SIGBUS.
    name = "\0".join([image.lower(), *(path if "://" in path else os.path.abspath(path) for path in paths)])
    dataset = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    name = f"index-{dataset[:16]}-{stamp[:16]}.arrow"
    beside = [] if "://" in paths[0] else [Path(paths[0]).parent / name]
    return [*beside, cache_folder() / name]


def _load(paths: Sequence[str], image: str, pool: ThreadPoolExecutor) -> Iterator[Shard | EmptyShardError]:
    """Yield the index of each shard, or the error that it holds no image, which matters only if no other shard does."""
    # A part at a time, so that the indexes of all shards are never in memory together.
    for first in range(0, len(paths), _CHUNK):
        yield from pool.map(_load_or_error, paths[first : first + _CHUNK], repeat(image))


def _load_or_error(path: str, image: str) -> Shard | EmptyShardError:
    try:
        return load_or_index(path, image)
    except EmptyShardError as error:
        return error


def _join(results: Iterator[Shard | EmptyShardError], builder: IndexBuilder) -> tuple[list[str], set[str]]:
    """Add the shards to the index; return what the user should know about them, and the paths of empty ones.

    Raises:
        EmptyShardError: if no shard holds an image.
    """
    empty, unused, num_left_out, num_shards = [], [], 0, 0
    for result in results:
        if isinstance(result, EmptyShardError):
            empty.append(result)
            continue
        builder.add(result)
        num_shards += 1
        num_left_out += result.num_left_out
        unused += [(result.path, result.unused)] if result.unused else []
    if not num_shards:
        raise empty[0]
    remarks = describe_unused(unused)
    if num_left_out:
        remarks.insert(0, f"{num_left_out} samples are left out because iwm shards check could not decode them")
    if empty:
        total = len(empty) + num_shards
        remarks.insert(0, f"{len(empty)} of {total} shards are left out because they hold no image: {empty[0]}")
    return remarks, {error.shard for error in empty}


def _save(builder: IndexBuilder, stamp: str, remarks: list[str], paths: list[Path]) -> DatasetIndex:
    """Store an index in the first of the files that can be written, or keep it in memory if there is none."""
    errors = []
    for path in paths:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Another process may have stored it, and others have mapped it, since this one looked for it.
            index = map_index(str(path), stamp) or builder.save(path, stamp, remarks)
            _remove_old(path)
            return index
        except OSError as error:
            errors.append(str(error))
    if errors:
        problem = printable("; ".join(errors))
        log.warning("the index of the data set cannot be stored and will be made again next time: %s", problem)
    return builder.in_memory(stamp, remarks)


def _remove_old(path: Path) -> None:
    """Remove indexes of the same data set that are outdated for so long that no run uses them."""
    dataset = path.name.rpartition("-")[0]
    for other in path.parent.glob(f"{dataset}*.arrow"):
        with suppress(OSError):
            if other != path and time.time() - other.stat().st_mtime > _KEPT_S:
                other.unlink()


def _index_in_processes(paths: Sequence[str], image: str) -> bool:
    """Index shards and store their indexes, in as many processes as this one may use cores.

    The caller will meet errors again.

    Returns:
        False if the shards are too few to be worth the start of processes.
    """
    count = min(len(os.sched_getaffinity(0)), len(paths) // _SHARDS_PER_PROCESS)
    if count < 2:
        return False
    log.info("indexing %d shards in %d processes", len(paths), count)
    # Not multiprocessing, which would run the user's script once more in each of them.
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command, processes = [sys.executable, "-c", _INDEX_LISTED], []
    try:
        for number in range(count):
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)
            processes.append(process)
            assert process.stdin is not None
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(json.dumps({"paths": paths[number::count], "image": image}).encode())
        for process in processes:
            process.wait()
    finally:
        # After an interruption; it does nothing to those that have ended.
        for process in processes:
            process.terminate()
            process.wait()
    return True


def index_listed() -> None:
    """Index the shards that standard input names, as one of several processes."""
    request = json.load(sys.stdin)

    def index(path: str) -> None:
        with suppress(Exception):
            load_or_index(path, request["image"])

    # Threads, because each index is forced to disk, and slow storage makes reads wait.
    with ThreadPoolExecutor(_THREADS_PER_PROCESS) as pool:
        list(pool.map(index, request["paths"]))
