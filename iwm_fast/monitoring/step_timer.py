"""Durations of the phases of a training step, measured by CUDA events on a GPU and by the host's clock on a CPU.

A GPU executes asynchronously, so its times can be read without waiting only one step later. On a GPU, the phase `wait`
is the time in which the device was idle because the host waited for data.
"""

import time
from itertools import pairwise

import torch
from torch.profiler import record_function

PHASES: tuple[str, ...] = ("wait", "forward", "teacher", "backward", "optimizer", "teacher_update")
"""wait: for a batch from the loader; forward: of the student; teacher: its forward pass; backward: loss and gradients,
with their exchange between ranks; optimizer: clipping and update; teacher_update: the EMA."""
LOCAL_PHASES: tuple[str, ...] = ("wait", "forward", "teacher")
"""Phases in which a rank does not wait for others, except with ZeRO stage 3, whose forward pass gathers weights."""


class StepTimer:
    """Measures the phases of one step. A phase lasts until the next one begins, and may occur several times."""

    def __init__(self, device: torch.device) -> None:
        self._is_on_gpu: bool = device.type == "cuda"
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._range: record_function | None = None

    def begin(self, phase: str) -> None:
        """End the current phase and begin one of PHASES."""
        self._mark(phase)
        # Label the phase in a profile. Without a profiler, a label would only cost microseconds. PyTorch has no public
        # name for this query.
        if torch.autograd._profiler_enabled():  # pyright: ignore[reportPrivateImportUsage]
            self._range = record_function(phase)
            self._range.__enter__()

    def stop(self) -> None:
        """End the last phase."""
        self._mark("")

    def _mark(self, phase: str) -> None:
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        self._marks.append((phase, self._now()))

    def _now(self) -> "float | torch.cuda.Event":
        if not self._is_on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @property
    def needs_sync(self) -> bool:
        """Whether reading the times right after the step would wait for the device."""
        return self._is_on_gpu

    def seconds(self) -> dict[str, float]:
        """Return the seconds of each of PHASES. Waits until a GPU has finished the step."""
        seconds = dict.fromkeys(PHASES, 0.0)
        for (phase, begin), (_, end) in pairwise(self._marks):
            seconds[phase] += _seconds_between(begin, end)
        return seconds


def _seconds_between(begin: "float | torch.cuda.Event", end: "float | torch.cuda.Event") -> float:
    if isinstance(begin, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        end.synchronize()
        # CUDA events measure milliseconds.
        return 1e-3 * begin.elapsed_time(end)
    assert isinstance(begin, float) and isinstance(end, float)
    return end - begin
