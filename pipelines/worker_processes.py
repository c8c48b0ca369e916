"""Processes that decode and encode images of shards in parallel, and how they keep memory."""

import ctypes
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

# Options of mallopt(3). glibc accepts at most 32 MiB for the first.
_M_MMAP_THRESHOLD, _MAX_REUSED_BYTES = -3, 32 * 2**20
_M_TRIM_THRESHOLD, _MAX_FREE_BYTES = -1, 256 * 2**20


def worker_pool(num_processes: int) -> ProcessPoolExecutor:
    """Return a pool of processes that keep freed memory; what they call must be importable and picklable."""
    # Spawned, because a forked process would inherit locks that threads of this process hold at that moment.
    return ProcessPoolExecutor(num_processes, mp_context=get_context("spawn"), initializer=keep_freed_memory)


def keep_freed_memory() -> None:
    """Let this process keep up to 256 MiB of memory that it has freed, to use it again.

    By default glibc gives the memory of an image back to the system, which then clears it page by page for the next
    image. On a virtual machine, that took half of the time of `iwm shards check`. Other C libraries are left as they
    are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAX_REUSED_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _MAX_FREE_BYTES)
