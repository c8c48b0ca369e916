"""Encoded bytes of given samples: positioned reads in a thread pool, from local or remote shards."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import numpy as np
from jaxtyping import Int64, UInt8

from pipelines.config import check
from pipelines.shards import ShardSet
from pipelines.tar_index import ShardError, ShardFile

# far below the usual limit of 1024 descriptors per process, which DALI, sockets and logs share
MAX_OPEN_FILES = 256


@dataclass(eq=False)
class _OpenFile:
    file: ShardFile
    num_users: int = 0


class FileCache:
    """Open shards, the least recently used closed first, never one that is being read."""

    def __init__(self, limit: int = MAX_OPEN_FILES) -> None:
        self._limit, self._lock = limit, Lock()
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()

    @contextmanager
    def lease(self, path: str) -> Iterator[ShardFile]:
        """Lend the open shard for the length of a `with` block."""
        with self._lock:
            entry = self._take(path)
        if entry is None:
            # opened outside the lock: a remote shard takes a request, others must not wait for it
            file = ShardFile(path)
            with self._lock:
                entry = self._take(path)
                if entry is None:
                    entry = self._open[path] = _OpenFile(file, num_users=1)
                    self._evict()
                else:
                    file.close()
        try:
            yield entry.file
        finally:
            with self._lock:
                entry.num_users -= 1
                self._evict()

    def _take(self, path: str) -> _OpenFile | None:
        entry = self._open.get(path)
        if entry is not None:
            entry.num_users += 1
            self._open.move_to_end(path)
        return entry

    def _evict(self) -> None:
        if len(self._open) <= self._limit:
            return
        unused = [path for path, entry in self._open.items() if entry.num_users == 0]
        for path in unused[: len(self._open) - self._limit]:
            self._open.pop(path).file.close()

    def close(self) -> None:
        """Close every file; nothing may be lent any more."""
        with self._lock:
            for entry in self._open.values():
                entry.file.close()
            self._open.clear()


class Reader:
    """Reads the encoded images of samples, several at a time."""

    def __init__(self, shards: ShardSet, num_threads: int) -> None:
        """Start the threads.

        Raises:
            ValueError: if there is no thread.
        """
        check(num_threads >= 1, "num_threads", num_threads, "be at least 1")
        self._shards, self._num_threads, self._files = shards, num_threads, FileCache()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reader")

    def submit(self, samples: Int64[np.ndarray, "B"]) -> "Future[list[UInt8[np.ndarray, '_']]]":
        """Begin to read these samples; the result holds their encoded images in the order asked for.

        The result raises:
            ShardError: if a shard has changed since it was indexed.
            OSError: if a shard cannot be read, with its path in a note.
        """
        shard, position = self._shards.locate(samples)
        # each thread reads forward through few files
        order = np.lexsort((position, shard))
        images: list[np.ndarray] = [np.empty(0, np.uint8)] * len(samples)

        def read_share(share: np.ndarray) -> None:
            for index in share:
                images[index] = self._read_image(int(shard[index]), int(position[index]))

        shares = np.array_split(order, min(self._num_threads, len(samples)) or 1)
        return _gather([self._pool.submit(read_share, share) for share in shares], images)

    def read(self, samples: Int64[np.ndarray, "B"]) -> list[UInt8[np.ndarray, "_"]]:
        """Read these samples and wait for them; raises as `submit`'s result."""
        return self.submit(samples).result()

    def _read_image(self, number: int, position: int) -> np.ndarray:
        shard = self._shards.shards[number]
        offset, size = int(shard.image_offset[position]), int(shard.image_size[position])
        try:
            with self._files.lease(shard.path) as file:
                content = file.read_at(offset, size)
        except OSError as error:
            error.add_note(f"while reading sample {shard.keys[position]!r} of shard {shard.path}")
            raise
        if len(content) < size:
            what = f"only {len(content)} of {size} bytes are left at byte {offset}: changed since it was indexed?"
            raise ShardError(what, shard=shard.path, key=shard.keys[position], remedy="restart to index it again")
        return np.frombuffer(content, np.uint8)

    def close(self) -> None:
        """Stop the threads and close the files; reads that have not begun are cancelled."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._files.close()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _gather(tasks: Sequence[Future], result: list[np.ndarray]) -> "Future[list[np.ndarray]]":
    """Return a future that holds `result` once all tasks are done, or the error of the first that failed."""
    gathered: Future[list[np.ndarray]] = Future()
    gathered.set_running_or_notify_cancel()
    lock, waiting, has_failed = Lock(), len(tasks), False

    def finish(task: Future) -> None:
        nonlocal waiting, has_failed
        error = CancelledError("the reader was closed") if task.cancelled() else task.exception()
        with lock:
            waiting -= 1
            is_first_error = error is not None and not has_failed
            has_failed = has_failed or error is not None
            is_complete = waiting == 0 and not has_failed
        # outside the lock: this runs the callbacks of whoever waits
        if is_first_error:
            gathered.set_exception(error)
        elif is_complete:
            gathered.set_result(result)

    for task in tasks:
        task.add_done_callback(finish)
    return gathered
