"""What a run says of itself while it goes on: where it stands, rows of numbers, lines on the terminal."""

import logging
import math
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from iwm_fast import distributed
from iwm_fast.objective import collapse_monitors, warnings_of
from iwm_fast.schedules import Schedules
from iwm_fast.step import StepReport
from pipelines.plan import BEGINNING, StreamStart

log = logging.getLogger("iwm_fast")


@dataclass
class Progress:
    """Where a run stands: what a checkpoint keeps beside the weights."""

    step: int = 0
    """Optimiser steps attempted; drives the data."""
    applied_steps: int = 0
    """Those that changed the weights; drives schedules and teacher."""
    start: StreamStart = BEGINNING
    """Where the stream of samples began."""


class LogWindow:
    """What happened since the last log row."""

    def __init__(self, schedules: Schedules, global_batch_size: int, device: torch.device) -> None:
        self._schedules, self._global_batch_size, self._device = schedules, global_batch_size, device
        self._begin()

    def _begin(self) -> None:
        self._started, self._wait_s, self._skipped, self._num_replaced = time.perf_counter(), 0.0, 0, 0
        self._losses: list[Tensor] = []

    def add(self, report: StepReport) -> None:
        """Count one step; nothing is read from the device."""
        self._losses.append(report.loss)
        self._wait_s += report.wait_s
        self._skipped += not report.is_applied
        self._num_replaced += report.num_replaced

    def close(self, report: StepReport, progress: Progress) -> dict[str, float]:
        """Return the row's values, summed or averaged over ranks, and begin the next window; every rank takes part."""
        monitors = collapse_monitors(
            report.prediction.predicted_tokens, report.target_tokens, report.prediction.patches
        )
        # the last one counts the ranks
        counted = torch.tensor([self._wait_s, self._num_replaced, 1.0], device=self._device, dtype=torch.float64)
        shared = torch.cat([torch.stack(list(monitors.values())).double(), counted])
        *summed, wait_s, num_replaced, num_ranks = distributed.sum_over_ranks(shared).tolist()
        wait_s /= num_ranks
        loss = distributed.sum_over_ranks(torch.stack(self._losses).double()).mean().item()
        steps, time_s = len(self._losses), time.perf_counter() - self._started
        lasted = max(progress.applied_steps - 1, 0)
        values = {
            "loss/prediction": loss,
            **{name: value / num_ranks for name, value in zip(monitors, summed, strict=True)},
            "optim/lr": self._schedules.lr(lasted),
            "optim/weight_decay": self._schedules.weight_decay(lasted),
            "optim/teacher_momentum": self._schedules.teacher_momentum(lasted),
            "optim/grad_norm": float(report.grad_norm),
            "optim/skipped_steps": float(self._skipped),
            "speed/images_per_s": steps * self._global_batch_size / time_s,
            "speed/step_s": time_s / steps,
            "data/wait_s": wait_s,
            "data/wait_share": wait_s / time_s,
            "data/replaced_samples": num_replaced,
        }
        self._begin()
        return values


def say(step: int, total_steps: int, values: dict[str, float]) -> None:
    """Log one line, and a warning for each monitor that crossed its threshold."""
    left = (total_steps - step) * values["speed/step_s"]
    log.info(
        "step %d/%d  loss %.4f  %.0f images/s  waiting %.1f %%  left %d:%02d", step, total_steps,
        values["loss/prediction"], values["speed/images_per_s"], 100 * values["data/wait_share"],
        *divmod(math.ceil(left), 60),
    )  # fmt: skip
    for sentence in warnings_of(values):
        log.warning("step %d: %s", step, sentence)
