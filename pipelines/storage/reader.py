"""Encoded bytes of given samples: positioned reads in a thread pool, from local or remote shards."""

from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event, Lock

import numpy as np
from jaxtyping import Int64, UInt8

from iwm_fast.pipelines.config import check
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.storage.tar_reader import ShardFile

# far below the usual limit of 1024 descriptors per process, which DALI, sockets and logs share
MAX_OPEN_FILES = 256

_CLOSED = "the reader was closed"
_REMEDY = "restart to index it again"


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
    """Reads the encoded images of samples, several at a time and what was asked for first, first.

    Bytes arrive at `num_threads` images per request time: 50 ms to a store and 64 threads make 1,280 images/s.
    """

    def __init__(self, shards: ShardSet, num_threads: int) -> None:
        """Start the threads.

        Raises:
            ValueError: if there is no thread.
        """
        check(num_threads >= 1, "num_threads", num_threads, "be at least 1")
        self._shards, self._num_threads, self._files = shards, num_threads, FileCache()
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reader")
        self._is_closed = Event()

    def submit(self, samples: Int64[np.ndarray, "B"]) -> "Future[list[UInt8[np.ndarray, '_']]]":
        """Begin to read these samples; the result holds their encoded images in the order asked for.

        The result raises:
            ShardError: if a shard has changed since it was indexed.
            OSError: if a shard cannot be read, with its path in a note.
        """
        return self._begin(samples).result

    def read(self, samples: Int64[np.ndarray, "B"]) -> list[UInt8[np.ndarray, "_"]]:
        """Read these samples and wait for them; raises as `submit`'s result."""
        reading = self._begin(samples)
        # whoever waits reads, too: the threads may be busy with what is wanted later
        reading.work()
        return reading.result.result()

    def _begin(self, samples: Int64[np.ndarray, "B"]) -> "_PendingRead":
        shard, position = self._shards.locate(samples)
        # files are read forward, and few at a time
        order = np.lexsort((position, shard)).tolist()
        reading = _PendingRead(order, lambda index: self._read_image(int(shard[index]), int(position[index])))
        # the pool takes tasks in their order, so no thread begins with a later request while an earlier one has images
        for _ in range(min(self._num_threads, len(order))):
            self._pool.submit(reading.work).add_done_callback(reading.fail_if_cancelled)
        return reading

    def _read_image(self, number: int, position: int) -> np.ndarray:
        shard = self._shards.shards[number]
        offset, size = int(shard.image_offset[position]), int(shard.image_size[position])
        if self._is_closed.is_set():
            raise CancelledError(_CLOSED)
        try:
            with self._files.lease(shard.path) as file:
                if file.size_bytes != shard.size_bytes:
                    what = f"has changed since it was indexed, from {shard.size_bytes} to {file.size_bytes} bytes"
                    raise ShardError(what, shard=shard.path, key=shard.keys[position], remedy=_REMEDY)
                content = file.read_at(offset, size)
        except OSError as error:
            error.add_note(f"while reading sample {shard.keys[position]!r} of shard {shard.path}")
            raise
        if len(content) < size:
            what = f"has changed since it was indexed: only {len(content)} of {size} bytes are left at byte {offset}"
            raise ShardError(what, shard=shard.path, key=shard.keys[position], remedy=_REMEDY)
        return np.frombuffer(content, np.uint8)

    def close(self) -> None:
        """Stop the threads and close the files; reads that have not begun are cancelled."""
        self._is_closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._files.close()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _PendingRead:
    """The images of one request, taken one by one by whichever thread is free, so that none waits for a slow answer."""

    def __init__(self, order: list[int], read_image: Callable[[int], np.ndarray]) -> None:
        self.result: Future[list[np.ndarray]] = Future()
        self.result.set_running_or_notify_cancel()
        self._read_image, self._waiting = read_image, deque(order)
        self._images, self._num_missing = [np.empty(0, np.uint8)] * len(order), len(order)
        self._lock, self._has_failed = Lock(), False
        if not order:
            self.result.set_result([])

    def work(self) -> None:
        """Read images until none is left to begin with."""
        while True:
            try:
                index = self._waiting.popleft()
            except IndexError:
                return
            try:
                image = self._read_image(index)
            except Exception as error:
                self._fail(error)
                return
            self._store(index, image)

    def _store(self, index: int, image: np.ndarray) -> None:
        with self._lock:
            self._images[index] = image
            self._num_missing -= 1
            is_complete = self._num_missing == 0 and not self._has_failed
        # outside the lock: this runs the callbacks of whoever waits
        if is_complete:
            self.result.set_result(self._images)

    def fail_if_cancelled(self, task: Future) -> None:
        """Let nobody wait for what is not read any more because the reader was closed."""
        if task.cancelled():
            self._fail(CancelledError(_CLOSED))

    def _fail(self, error: Exception) -> None:
        self._waiting.clear()
        with self._lock:
            is_first = not self._has_failed and self._num_missing > 0
            self._has_failed = True
        if is_first:
            self.result.set_exception(error)
