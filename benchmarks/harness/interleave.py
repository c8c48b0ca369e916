"""Time streams of batches in interleaved rounds: only one stream is open at a time, and the order alternates.

Each round opens a stream, discards the batches prefetched while it was opening, and counts images until its time is
over. The results are the CPU time per image of all processes that take part, which hardly depends on what else runs on
the machine, and the rate at which a training loop that takes no time itself would receive images.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

from benchmarks.harness.machine import cpu_time_s
from benchmarks.harness.session import Case, Session
from benchmarks.harness.timing import Failure, Name, first_line, interleaved_rounds, percentiles


class StreamBudget(NamedTuple):
    """How long to measure streams that are compared."""

    rounds: int
    seconds: float
    """Minimum duration of one round of one stream, without the time to open it."""
    min_batches: int
    """Minimum number of batches per round."""


FULL = StreamBudget(rounds=5, seconds=5.0, min_batches=8)
QUICK = StreamBudget(rounds=2, seconds=1.0, min_batches=2)


class Stream(NamedTuple):
    """A source of batches."""

    start: Callable[[], Any]
    """Returns an iterator of batches, often a generator, whose close() ends the production."""
    consume: Callable[[Any], int]
    """Waits until a batch is complete, as training would, and returns its number of images."""
    prefetched: int = 0
    """Maximum number of batches produced before the first one is requested."""
    burst: int = 1
    """Batches that arrive together because parallel workers produce them; a round ends after a complete burst."""

    def open(self) -> closing[Any]:
        """Return a context manager that yields the iterator and closes it on exit."""
        return closing(self.start())


class StreamRound(NamedTuple):
    """Result of one round of one stream."""

    images: int
    batch_s: list[float]
    """Seconds waited for each batch."""
    cpu_s: float | None = None
    """CPU time of this process and its workers during the round; None if it was not measured."""

    @property
    def images_per_s(self) -> float:
        """Images over the time from the last discarded batch to the last counted one."""
        return self.images / sum(self.batch_s)


def compare(
    streams: Mapping[Name, Stream],
    budget: StreamBudget,
    *,
    prepare: Callable[[], object] = lambda: None,
    max_batches: int | None = None,
    deadline: float = math.inf,
) -> dict[Name, list[StreamRound] | Failure]:
    """Measure all streams in interleaved rounds; a stream that raises becomes a failure and the others continue.

    `prepare` is called before a stream is opened. A round has at most `max_batches`, including discarded ones, and does
    not start after `deadline`, a time on the monotonic clock.
    """
    failures: dict[Name, Failure] = {}
    rounds: dict[Name, list[StreamRound]] = {name: [] for name in streams}
    for name in interleaved_rounds(streams, budget.rounds, lambda _: time.monotonic() <= deadline):
        if name in failures:
            continue
        # A closed stream can hold files and memory in reference cycles until they are collected.
        gc.collect()
        prepare()
        try:
            rounds[name].append(run_round(streams[name], budget, max_batches))
        except Exception as error:
            failures[name] = Failure(first_line(error))
    return {name: failures.get(name) or rounds[name] for name in streams}


def run_round(stream: Stream, budget: StreamBudget, max_batches: int | None = None) -> StreamRound:
    """Open a stream and count its images until the time is over.

    Raises:
        RuntimeError: if the stream ends before any batch is counted.
    """
    images, batch_s = 0, []
    with stream.open() as batches:
        for batch in islice(batches, stream.prefetched):
            stream.consume(batch)
        begin_cpu_s = cpu_time_s()
        begin = last = time.perf_counter()
        for batch in islice(batches, None if max_batches is None else max_batches - stream.prefetched):
            images += stream.consume(batch)
            now = time.perf_counter()
            batch_s.append(now - last)
            last = now
            is_long_enough = now - begin >= budget.seconds and len(batch_s) >= budget.min_batches
            if is_long_enough and len(batch_s) % stream.burst == 0:
                break
        cpu_s = cpu_time_s() - begin_cpu_s
    if not batch_s:
        raise RuntimeError("all batches were prefetched: too little data for a round")
    return StreamRound(images, batch_s, cpu_s)


def summarize(rounds: Sequence[StreamRound]) -> dict[str, Any]:
    """Return median and percentiles over rounds of the milliseconds per batch, at the first round's batch size."""
    batch_size = rounds[0].images / len(rounds[0].batch_s)
    return percentiles([1e3 * batch_size / result.images_per_s for result in rounds])


def record(session: Session, case: Case, provider: str, result: list[StreamRound] | Failure, **figures: Any) -> None:
    """Record milliseconds per batch over complete rounds, CPU time and rate of images, and waiting times."""
    if isinstance(result, Failure):
        session.record(case, provider, failure=result.message)
        return
    images_per_s = statistics.median(stream_round.images_per_s for stream_round in result)
    waits_ms = sorted(1e3 * wait for stream_round in result for wait in stream_round.batch_s)
    rates = {
        "images_per_s": round(images_per_s, 1),
        "images_per_s_per_core": round(images_per_s / session.machine["cores"], 1),
        "batch_p50_ms": round(statistics.median(waits_ms), 2),
        "batch_p99_ms": round(waits_ms[int(0.99 * len(waits_ms))], 2),
        "batches": len(waits_ms),
        "images": sum(stream_round.images for stream_round in result),
    }
    if cpu_ms := [1e3 * stream_round.cpu_s / stream_round.images for stream_round in result if stream_round.cpu_s]:
        rates["cpu_ms_per_image"] = round(statistics.median(cpu_ms), 3)
    session.record(case, provider, **summarize(result), figures=rates | figures)
