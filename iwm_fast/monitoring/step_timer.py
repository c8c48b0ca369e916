"""How long the parts of a step take, by the clock of what computes: events of a GPU, the host's clock on a CPU.

A GPU works behind the host. Its times are read when it has passed the last mark, so whoever reads them a step later
waits for nothing. What it waited for, data above all, is the time in which it had nothing else to do.
"""

import time
from itertools import pairwise

import torch
from torch.profiler import record_function

PARTS: tuple[str, ...] = ("wait", "forward", "teacher", "backward", "optimizer", "teacher_update")
"""For the loader's batch; the student; the teacher; loss and gradients, with their exchange between ranks; clipping and
the new weights; the teacher's new weights."""
BEFORE_EXCHANGE: tuple[str, ...] = ("wait", "forward", "teacher")
"""Parts in which a rank does not wait for others (but with ZeRO stage 3, where the forward pass gathers weights)."""


class StepTimer:
    """Takes one step's time; a part lasts until the next begins, and may begin again."""

    def __init__(self, device: torch.device) -> None:
        self._is_on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._range: record_function | None = None

    def begin(self, part: str) -> None:
        """End the part before, begin one of PARTS."""
        self._mark(part)
        # the same names in a trace; without one a range would cost microseconds. torch has no public name for this
        if torch.autograd._profiler_enabled():  # pyright: ignore[reportPrivateImportUsage]
            self._range = record_function(part)
            self._range.__enter__()

    def stop(self) -> None:
        """End the last part."""
        self._mark("")

    def _mark(self, part: str) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        self._marks.append((part, self._now()))

    def _now(self) -> "float | torch.cuda.Event":
        if not self._is_on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def needs_sync(self) -> bool:
        """Whether reading at once would wait for a device."""
        return self._is_on_gpu

    def seconds(self) -> dict[str, float]:
        """Return the time of each of PARTS; waits until a GPU has passed the last mark."""
        spent = dict.fromkeys(PARTS, 0.0)
        for (part, begin), (_, end) in pairwise(self._marks):
            spent[part] += _seconds_between(begin, end)
        return spent


def _seconds_between(begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)
    assert isinstance(begin, float) and isinstance(end, float)
    return end - begin
