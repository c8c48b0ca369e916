"""Time and memory to open a data set in a process and on all ranks of a machine, by its size; and to index new shards.

Source shards of tiny samples are linked under many names, each with its index, so that only the number of samples is
large. Memory is what a process holds itself; pages of the index that it maps belong to the page cache.
"""

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from benchmarks.harness.machine import num_cores
from benchmarks.harness.photograph_shards import write_once
from benchmarks.harness.session import Case, Session, WrongResultError
from benchmarks.harness.timing import percentiles
from benchmarks.pipelines.report import INDEXING, OPENING, OPENING_ON_RANKS, OURS, THREADS
from benchmarks.pipelines.streams import Workload
from iwm_fast.pipelines.storage.index_cache import load_or_index
from iwm_fast.pipelines.storage.shard_set import find_shards, open_shards

NUM_SHARDS, SAMPLES_PER_SHARD, NUM_SOURCES, NUM_RANKS = (1000, 10_000), 1281, 200, 8
_REPEATS = 5
_OLD_MTIME_S = 1_700_000_000
"""A modification time in November 2023: a shard's index is stored only if the shard is at least two seconds old."""


def run(
    session: Session,
    workload: Workload,
    num_shards: Sequence[int] = NUM_SHARDS,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    num_sources: int = NUM_SOURCES,
    num_ranks: int = NUM_RANKS,
) -> None:
    """Index the source shards, and open data sets of several sizes on all ranks; the first one also in this process."""
    folder = workload.folder / f"sources-{num_sources}x{samples_per_shard}"
    numbers = range(num_sources * samples_per_shard)
    samples = ({"__key__": f"n{number:08}", "jpg": b"x", "cls": b"0"} for number in numbers)
    sources = find_shards(write_once(folder, samples, samples_per_shard))
    for path in sources:
        os.utime(path, (_OLD_MTIME_S, _OLD_MTIME_S))
    _index(session, str(folder), sources, samples_per_shard)
    for count in num_shards:
        spec = _link(workload.folder / f"dataset-{count}x{samples_per_shard}", sources, count)
        begin = time.perf_counter()
        shards = open_shards(spec)
        figures = {"build_s": round(time.perf_counter() - begin, 2)}
        if shards.num_samples != count * samples_per_shard or shards.index.path.startswith("/proc"):
            raise WrongResultError(f"{OPENING_ON_RANKS}: {shards.num_samples} samples, index {shards.index.path}")
        if count == num_shards[0]:
            _open_here(session, spec, figures["build_s"])
        figures["index_mb"] = round(os.path.getsize(shards.index.path) / 1e6, 1)
        results = _open_on_ranks(spec, num_ranks)
        figures["private_mb"] = round(max(grown for _, grown in results) / 1e6, 2)
        case = Case(OPENING_ON_RANKS, {"shards": count, "samples": shards.num_samples, "ranks": num_ranks})
        session.record(case, OURS, **percentiles([1e3 * seconds for seconds, _ in results]), figures=figures)


def _open_here(session: Session, spec: str, first_s: float) -> None:
    """Time opening a data set that has an index, and the digest of its keys and sizes, in this process."""
    times_ms = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        shards = open_shards(spec)
        times_ms.append(1e3 * (time.perf_counter() - begin))
    begin = time.perf_counter()
    _ = shards.content_digest
    figures = {"first_s": first_s, "digest_s": round(time.perf_counter() - begin, 3)}
    case = Case(OPENING, {"shards": len(shards.shards), "samples": shards.num_samples})
    session.record(case, OURS, **percentiles(times_ms), figures=figures)


def _index(session: Session, folder: str, sources: Sequence[str], samples_per_shard: int) -> None:
    """Time indexing shards that have no index: in processes, and in the threads of one process."""

    def in_threads() -> None:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(load_or_index, sources))

    for provider, function in ((THREADS, in_threads), (OURS, lambda: open_shards(folder))):
        for path in (*Path(folder).glob("*.index"), *Path(folder).glob("*.arrow")):
            path.unlink()
        begin, busy = time.perf_counter(), _busiest_cpu_s()
        function()
        seconds, busy = time.perf_counter() - begin, _busiest_cpu_s() - busy
        num_samples = len(sources) * samples_per_shard
        figures = {"samples_per_s": round(num_samples / seconds), "samples_per_cpu_s": round(num_samples / busy)}
        case = Case(INDEXING, {"shards": len(sources), "samples": num_samples})
        session.record(case, provider, **percentiles([1e3 * seconds]), figures=figures)


def _busiest_cpu_s() -> float:
    """Return the CPU time of this process and of one of its processes."""
    own, processes = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + (processes.ru_utime + processes.ru_stime) / num_cores()


def _link(folder: Path, sources: Sequence[str], count: int) -> str:
    """Link shards and their indexes under many names; return the folder."""
    folder.mkdir(exist_ok=True)
    for number in range(count):
        for ending in ("", ".index"):
            link, source = folder / f"{number:06}.tar{ending}", Path(f"{sources[number % len(sources)]}{ending}")
            if not link.exists() or not link.samefile(source):
                link.unlink(missing_ok=True)
                link.hardlink_to(source)
    return str(folder)


def _open_on_ranks(spec: str, num_ranks: int) -> list[tuple[float, int]]:
    """Return, for each repetition, the time until all ranks have a batch, and how many bytes the largest has grown."""
    command = [sys.executable, "-m", "benchmarks.pipelines.opening_rank"]
    start = partial(subprocess.Popen, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with ExitStack() as stack:
        ranks = [stack.enter_context(start()) for _ in range(num_ranks)]
        for rank in ranks:
            _answer(rank)
        results = []
        for _ in range(_REPEATS):
            begin = time.perf_counter()
            _ask(ranks[0], f"open {spec}")
            # As in training: the first rank opens the shards, and the others map its index.
            place, grown = _answer(ranks[0])
            for rank in ranks[1:]:
                _ask(rank, f"map {place}")
            sizes = [grown, *(_answer(rank)[1] for rank in ranks[1:])]
            results.append((time.perf_counter() - begin, max(map(int, sizes))))
        return results


def _ask(rank: subprocess.Popen[str], request: str) -> None:
    assert rank.stdin is not None
    rank.stdin.write(f"{request}\n")
    rank.stdin.flush()


def _answer(rank: subprocess.Popen[str]) -> list[str]:
    assert rank.stdout is not None
    words = rank.stdout.readline().split()
    if not words:
        raise WrongResultError(f"{OPENING_ON_RANKS}: a rank has ended")
    return words
