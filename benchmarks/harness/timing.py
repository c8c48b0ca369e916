"""Time functions: warm, in turns and out of the cache; what the device takes by events, what the host takes beside it.

Machines are noisy, so whatever is compared runs in one process in turns, A B C A B C, and is told by median and spread.
Without a GPU the same code times by the host's clock: good for trying the benchmarks out, not for results.
"""

import functools
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

FLUSH_BYTES = 256 * 2**20
"""Read between repeats; an H100 caches 50 MB, an H200 60 MB."""
COPY_BYTES = 2 * 2**30
"""Size of the tensor whose copy measures the memory's bandwidth."""
MATRIX_SIDE = 8192
"""Side of the matrices whose product measures the rate of matrix instructions."""

_CYCLES_PER_MS = 2_000_000
_LONGEST_NAP_MS = 50.0

Name = TypeVar("Name", bound=Hashable)


class Timing(NamedTuple):
    """Milliseconds of one function."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    host_ms: float
    """Median of what the host needs to start the work."""


class Failure(NamedTuple):
    """A function that raised."""

    line: str
    """First line of the error."""


class Effort(NamedTuple):
    """How long to measure a group of functions that are compared."""

    seconds: float
    fewest: int
    most: int
    warm_ups: int = 5


FULL = Effort(seconds=0.8, fewest=20, most=200)
QUICK = Effort(seconds=0.25, fewest=10, most=50)


class Work(NamedTuple):
    """What is timed, and what happens before it, untimed."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


def measure(function: Callable[[], object], *, effort: Effort = FULL) -> Timing:
    """Time one function.

    Raises:
        RuntimeError: if the function raised, with the first line of its error.
    """
    timing = compare({"it": Work(lambda _: function())}, effort=effort)["it"]
    if isinstance(timing, Failure):
        raise RuntimeError(timing.line)
    return timing


def compare(works: dict[str, Work], *, effort: Effort = FULL) -> dict[str, Timing | Failure]:
    """Time functions in turns; one that raises while it warms up is a failure and the others go on."""
    warmed = {name: warm_up(work, effort.warm_ups) for name, work in works.items()}
    naps = {name: nap_ms for name, nap_ms in warmed.items() if not isinstance(nap_ms, Failure)}
    begin = time.perf_counter()
    for name, nap_ms in naps.items():
        _once(works[name], nap_ms)
    turn_s = max(time.perf_counter() - begin, 1e-6)
    repeats = min(max(int(effort.seconds / turn_s), effort.fewest), effort.most)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in naps}
    for _ in range(repeats):
        for name, nap_ms in naps.items():
            times[name].append(_once(works[name], nap_ms))
    return {name: one if isinstance(one, Failure) else summarize(times[name]) for name, one in warmed.items()}


def in_turns(names: Iterable[Name], rounds: int, has_time: Callable[[int], bool]) -> Iterator[Name]:
    """Yield all names once a round, in changing order, as long as there is time for the second round and so on."""
    order = list(names)
    for number in range(rounds):
        if number > 0 and not has_time(number + 1):
            break
        yield from order[:: 1 if number % 2 == 0 else -1]


def spread(times_ms: Sequence[float]) -> dict[str, Any]:
    """Return median and percentiles of milliseconds under a record's names; a single time is all of them."""
    tenths = statistics.quantiles(times_ms, n=10, method="inclusive") if len(times_ms) > 1 else [*times_ms] * 9
    return {"median_ms": tenths[4], "p20_ms": tenths[1], "p80_ms": tenths[7], "repeats": len(times_ms)}


def summarize(times: Sequence[tuple[float, float]]) -> Timing:
    """Return median and percentiles of (device, host) milliseconds."""
    device_ms, host_ms = zip(*times, strict=True)
    return Timing(**spread(device_ms), host_ms=statistics.median(host_ms))


def warm_up(work: Work, times: int) -> float | Failure:
    """Run work until it is compiled and loaded; return for how long the device has to wait for the host, in ms."""
    try:
        hosts = [_once(work, 0.0)[1] for _ in range(times)]
    except Exception as error:
        failure = Failure(first_line(error))
    else:
        return min(2 * max(hosts[-2:]) + 0.05, _LONGEST_NAP_MS)
    if torch.cuda.is_available():
        # after an illegal access every call fails: then this raises too and ends the run
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    return failure


def first_line(error: BaseException) -> str:
    """Return an error's type and first line: what a table has room for."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _once(work: Work, nap_ms: float) -> tuple[float, float]:
    """Return milliseconds of device and host."""
    state = work.prepare()
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        work.run(state)
        spent_ms = 1e3 * (time.perf_counter() - begin)
        return spent_ms, spent_ms
    # read, not overwritten as usual: lines that are dirty would be written back while the clock runs
    _flush_buffer().sum()
    # the device waits until all of the work is enqueued; otherwise short kernels measure the host
    torch.cuda._sleep(int(nap_ms * _CYCLES_PER_MS))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin = time.perf_counter()
    start.record()
    work.run(state)
    end.record()
    host_ms = 1e3 * (time.perf_counter() - begin)
    end.synchronize()
    return start.elapsed_time(end), host_ms


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.ones(FLUSH_BYTES // 4, device="cuda")


def copy_bandwidth(device: str, *, num_bytes: int = COPY_BYTES, effort: Effort = FULL) -> float:
    """Return bytes per second of a copy within the device's memory, read and written."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / (1e-3 * measure(lambda: target.copy_(source), effort=effort).median_ms)


def matrix_rate(device: str, *, side: int = MATRIX_SIDE, effort: Effort = FULL) -> float:
    """Return bfloat16 operations per second of a large matrix product on random numbers (zeros run faster)."""
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / (1e-3 * measure(lambda: left @ right, effort=effort).median_ms)
