"""Time functions on warm code and a cold cache: the device by events, and the host's time to enqueue the work.

Machines are noisy, so functions that are compared run in one process and alternate, A B C A B C; each is reported as a
median with percentiles. Without a GPU the host's clock is used: that tests the benchmarks, but yields no results.
"""

import contextlib
import functools
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks.harness import device

# torch.cuda._sleep counts clock cycles. At 2 GHz, above the clock of an H100 or H200, the wait is never too short.
_CYCLES_PER_MS = 2_000_000
_MAX_SPIN_MS = 50.0

Name = TypeVar("Name", bound=Hashable)


class Timing(NamedTuple):
    """Time of one function in milliseconds."""

    median_ms: float
    p20_ms: float
    p80_ms: float
    repeats: int
    host_ms: float
    """Median time that the host needs to enqueue the work."""


class Failure(NamedTuple):
    """A function that raised."""

    message: str
    """Type and first line of the error."""


class TimingBudget(NamedTuple):
    """How long to time a group of functions that are compared."""

    seconds: float
    min_repeats: int
    max_repeats: int
    warm_ups: int = 5


FULL = TimingBudget(seconds=0.8, min_repeats=20, max_repeats=200)
QUICK = TimingBudget(seconds=0.25, min_repeats=10, max_repeats=50)
TRIAL = TimingBudget(seconds=0.0, min_repeats=1, max_repeats=1, warm_ups=1)
"""For Triton's interpreter, whose times mean nothing."""


class TimedFunction(NamedTuple):
    """A function to time, and the untimed preparation of its argument."""

    run: Callable[[Any], object]
    prepare: Callable[[], Any] = lambda: None


def measure(function: Callable[[], object], *, budget: TimingBudget = FULL) -> Timing:
    """Time one function.

    Raises:
        RuntimeError: if the function raised, with the first line of its error.
    """
    timing = compare({"": TimedFunction(lambda _: function())}, budget=budget)[""]
    if isinstance(timing, Failure):
        raise RuntimeError(timing.message)
    return timing


def compare(functions: dict[str, TimedFunction], *, budget: TimingBudget = FULL) -> dict[str, Timing | Failure]:
    """Time functions alternately; a function that raises becomes a failure and the others continue.

    If the failure leaves the GPU unusable, only the failures are returned.
    """
    spins_ms: dict[str, float] = {}
    times: dict[str, list[tuple[float, float]]] = {}
    failures: dict[str, Failure] = {}
    try:
        for name, function in functions.items():
            with catching(failures, name):
                spins_ms[name] = warm_up(function, budget.warm_ups)
            if name in failures:
                torch.cuda.empty_cache()
        begin = time.perf_counter()
        _time_round(functions, spins_ms, times, failures)
        round_s = max(time.perf_counter() - begin, 1e-6)
        times.clear()
        for _ in range(min(max(int(budget.seconds / round_s), budget.min_repeats), budget.max_repeats)):
            _time_round(functions, spins_ms, times, failures)
    except device.UnusableGpuError:
        return dict(failures)
    return {name: failures.get(name) or summarize(times[name]) for name in functions}


def _time_round(
    functions: dict[str, TimedFunction],
    spins_ms: dict[str, float],
    times: dict[str, list[tuple[float, float]]],
    failures: dict[str, Failure],
) -> None:
    """Time each function that has not failed once, and append its milliseconds of device and host."""
    for name, function in functions.items():
        if name not in failures:
            with catching(failures, name):
                times.setdefault(name, []).append(_time_once(function, spins_ms[name]))


@contextlib.contextmanager
def catching(failures: dict[str, Failure], name: str) -> Iterator[None]:
    """Turn an error, also of a kernel that is still running, into a failure of this name.

    Raise UnusableGpuError if it left the GPU unusable.
    """
    try:
        yield
        device.synchronize()
    except Exception as error:
        failures[name] = Failure(first_line(error))
        device.check_usable()


def interleaved_rounds(names: Iterable[Name], rounds: int, has_time: Callable[[int], bool]) -> Iterator[Name]:
    """Yield all names once per round, reversing the order each round; `has_time(n)` decides if round n >= 2 starts."""
    order = list(names)
    for number in range(rounds):
        if number > 0 and not has_time(number + 1):
            break
        yield from order[:: 1 if number % 2 == 0 else -1]


def percentiles(times_ms: Sequence[float]) -> dict[str, Any]:
    """Return median, 20th and 80th percentile under the field names of a record; for a single time, that time."""
    tenths = statistics.quantiles(times_ms, n=10, method="inclusive") if len(times_ms) > 1 else [*times_ms] * 9
    return {"median_ms": tenths[4], "p20_ms": tenths[1], "p80_ms": tenths[7], "repeats": len(times_ms)}


def summarize(times: Sequence[tuple[float, float]]) -> Timing:
    """Return median and percentiles of (device, host) milliseconds."""
    device_ms, host_ms = zip(*times, strict=True)
    return Timing(**percentiles(device_ms), host_ms=statistics.median(host_ms))


def warm_up(function: TimedFunction, repeats: int) -> float:
    """Run a function until it is compiled and loaded.

    Returns:
        Milliseconds that the device must spin so that the host can enqueue all work first.
    """
    host_ms = [_time_once(function, 0.0)[1] for _ in range(repeats)]
    # The first calls compile. Twice the slower of the last two leaves a margin for a busy host.
    return min(2 * max(host_ms[-2:]) + 0.05, _MAX_SPIN_MS)


def first_line(error: BaseException) -> str:
    """Return type and first line of an error, at most 200 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def _time_once(function: TimedFunction, spin_ms: float) -> tuple[float, float]:
    """Return the milliseconds of device and host for one call."""
    state = function.prepare()
    if not torch.cuda.is_available():
        begin = time.perf_counter()
        function.run(state)
        elapsed_ms = 1e3 * (time.perf_counter() - begin)
        return elapsed_ms, elapsed_ms
    # The usual way is to overwrite a buffer. That leaves dirty cache lines, whose write-back would fall into the
    # timed region, so the buffer is only read.
    _flush_buffer().sum()
    # The device spins until the host has enqueued all work. Otherwise short kernels would measure the host.
    torch.cuda._sleep(int(spin_ms * _CYCLES_PER_MS))
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin = time.perf_counter()
    start.record()
    function.run(state)
    end.record()
    host_ms = 1e3 * (time.perf_counter() - begin)
    end.synchronize()
    return start.elapsed_time(end), host_ms


@functools.cache
def _flush_buffer() -> torch.Tensor:
    # 256 MB: the L2 cache has 50 MB on an H100 and 60 MB on an H200.
    return torch.ones(2**26, device="cuda")


def copy_bandwidth(device: str, *, num_bytes: int = 2 * 2**30, budget: TimingBudget = FULL) -> float:
    """Return bytes per second of a copy within device memory, counting bytes read and bytes written."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / (1e-3 * measure(lambda: target.copy_(source), budget=budget).median_ms)


def matrix_rate(device: str, *, budget: TimingBudget = FULL) -> float:
    """Return bfloat16 FLOP/s of a large product of random matrices (products of zeros run faster)."""
    side = 8192
    left, right = torch.randn(2, side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / (1e-3 * measure(lambda: left @ right, budget=budget).median_ms)
