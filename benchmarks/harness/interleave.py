"""Time streams of batches in turns: one at a time is open and runs, round after round, in changing order.

A turn leaves out the batches that were made ahead while the stream was opening, and then counts images until its time
is over. So what is measured is what a training would wait for if it took no time itself.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, NamedTuple

from benchmarks.harness.session import Case, Session
from benchmarks.harness.timing import Failure, Name, first_line, in_turns, spread


class Turns(NamedTuple):
    """How long to measure streams that are compared."""

    rounds: int
    seconds: float
    """Of one turn, without opening."""
    fewest: int
    """Batches of a turn, however long they take."""


FULL = Turns(rounds=5, seconds=5.0, fewest=8)
QUICK = Turns(rounds=2, seconds=1.0, fewest=2)


class Stream(NamedTuple):
    """Batches from someone who makes them."""

    start: Callable[[], Any]
    """Start to make batches; returns an iterator, often a generator, whose close() stops it."""
    take: Callable[[Any], int]
    """Have a batch as training would, and return how many images are in it."""
    ahead: int = 0
    """Batches that may have been made before they were asked for."""
    burst: int = 1
    """Batches that are made at the same time, each by a worker: a turn ends with the last of them."""

    def open(self) -> closing[Any]:
        """Return a context in which batches are made."""
        return closing(self.start())


class Turn(NamedTuple):
    """What came in one turn."""

    images: int
    batch_s: list[float]
    """How long each batch was waited for."""

    @property
    def images_per_s(self) -> float:
        """Images over the time from the last batch left out to the last one counted."""
        return self.images / sum(self.batch_s)


def compare(
    streams: Mapping[Name, Stream],
    turns: Turns,
    *,
    prepare: Callable[[], object] = lambda: None,
    most_batches: int | None = None,
    deadline: float = math.inf,
) -> dict[Name, list[Turn] | Failure]:
    """Give each stream its turns; one that raises is a failure and the others go on.

    Args:
        streams: by name.
        turns: how long.
        prepare: is called before a stream is opened.
        most_batches: after so many, the ones left out among them, a turn is over.
        deadline: no further round is started then, on the monotonic clock.
    """
    failures: dict[Name, Failure] = {}
    taken: dict[Name, list[Turn]] = {name: [] for name in streams}
    for name in in_turns(streams, turns.rounds, lambda _: time.monotonic() <= deadline):
        if name in failures:
            continue
        # an earlier stream may hold files and memory until it is cleared away
        gc.collect()
        prepare()
        try:
            taken[name].append(take_turn(streams[name], turns, most_batches))
        except Exception as error:
            failures[name] = Failure(first_line(error))
    return {name: failures.get(name) or taken[name] for name in streams}


def take_turn(stream: Stream, turns: Turns, most_batches: int | None = None) -> Turn:
    """Open a stream and count its images until the time is over."""
    images, batch_s = 0, []
    with stream.open() as batches:
        for batch in islice(batches, stream.ahead):
            stream.take(batch)
        begin = last = time.perf_counter()
        for batch in islice(batches, None if most_batches is None else most_batches - stream.ahead):
            images += stream.take(batch)
            now = time.perf_counter()
            batch_s.append(now - last)
            last = now
            is_long_enough = now - begin >= turns.seconds and len(batch_s) >= turns.fewest
            if is_long_enough and len(batch_s) % stream.burst == 0:
                break
    if not batch_s:
        raise RuntimeError("every batch was made ahead: there is too little data for a turn")
    return Turn(images, batch_s)


def summarize(taken: Sequence[Turn]) -> dict[str, Any]:
    """Return median and percentiles over turns of the milliseconds per batch, at the size of the first."""
    size = taken[0].images / len(taken[0].batch_s)
    return spread([1e3 * size / turn.images_per_s for turn in taken])


def note(session: Session, case: Case, provider: str, result: list[Turn] | Failure, **figures: Any) -> None:
    """Write a record: ms per batch over whole turns, images per second, and how long batches were waited for."""
    if isinstance(result, Failure):
        session.note(case, provider, failure=result.line)
        return
    images_per_s = statistics.median(turn.images_per_s for turn in result)
    waits_ms = sorted(1e3 * wait for turn in result for wait in turn.batch_s)
    found = {
        "images_per_s": round(images_per_s, 1),
        "images_per_s_per_core": round(images_per_s / session.machine["cores"], 1),
        "batch_p50_ms": round(statistics.median(waits_ms), 2),
        "batch_p99_ms": round(waits_ms[int(0.99 * len(waits_ms))], 2),
        "batches": len(waits_ms),
        "images": sum(turn.images for turn in result),
    }
    session.note(case, provider, **summarize(result), figures=found | figures)
