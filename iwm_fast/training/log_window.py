"""The rows of numbers that a run writes about itself."""

import time

import torch
from jaxtyping import Float64
from torch import Tensor

from iwm_fast.monitoring.collapse import collapse_monitors
from iwm_fast.monitoring.step_timer import BEFORE_EXCHANGE, PARTS, StepTimer
from iwm_fast.monitoring.throughput import used_memory_mb
from iwm_fast.runtime import distributed
from iwm_fast.training.schedules import Schedules
from iwm_fast.training.step import StepReport
from iwm_fast.training.task import TrainTask
from iwm_fast.training.train_state import TrainState


class PhaseTimes:
    """What the parts of this rank's steps took; a GPU's are read one step late, when they are there anyway."""

    def __init__(self) -> None:
        self._late: StepTimer | None = None
        self._clear()

    def _clear(self) -> None:
        self._sums, self._num_steps = dict.fromkeys(PARTS, 0.0), 0

    def add(self, timer: StepTimer) -> None:
        """Take in a step that was stopped."""
        late, self._late = self._late, timer
        if late is not None:
            self._read(late)
        if not timer.needs_sync:
            self._read_last()

    def _read_last(self) -> None:
        if self._late is not None:
            self._read(self._late)
            self._late = None

    def _read(self, timer: StepTimer) -> None:
        for part, seconds in timer.seconds().items():
            self._sums[part] += seconds
        self._num_steps += 1

    def pop_means(self) -> dict[str, float]:
        """Return the means in seconds per step, and start over."""
        if self._num_steps == 0:
            self._read_last()
        means = {part: total / max(self._num_steps, 1) for part, total in self._sums.items()}
        self._clear()
        return means


class LogWindow:
    """What happened since the last log row."""

    def __init__(self, task: TrainTask, schedules: Schedules) -> None:
        self._task = task
        self._schedules = schedules
        self._parts = PhaseTimes()
        self._begin()

    def _begin(self) -> None:
        self._started = time.perf_counter()
        self._skipped = 0
        self._num_replaced = 0
        self._losses: list[Tensor] = []

    def add(self, report: StepReport) -> None:
        """Count one step; nothing is waited for."""
        self._losses.append(report.loss)
        self._parts.add(report.timer)
        self._skipped += not report.is_applied
        self._num_replaced += report.num_replaced

    def pop_metrics(self, report: StepReport, state: TrainState) -> dict[str, float]:
        """Return the row's values, which every rank has a share in, and begin the next window; collective."""
        monitors = {}
        if report.prediction is not None and report.target_tokens is not None:
            predicted = report.prediction
            monitors = collapse_monitors(predicted.predicted_tokens, report.target_tokens, predicted.patches)
        on_device = {"loss": torch.stack(self._losses).double().mean(), **monitors}
        memory = used_memory_mb(self._task.rank_info.device)
        on_host = {"replaced": float(self._num_replaced), "memory": memory, **self._parts.pop_means()}
        ranks = self._every_rank(on_device, on_host)
        steps, time_s = len(self._losses), time.perf_counter() - self._started
        speed = self._task.meter.values(steps, time_s)
        values = {
            self._task.loss_name: float(ranks["loss"].sum()),
            **{name: float(ranks[name].mean()) for name in monitors},
            **self._schedule_values(state, has_teacher=report.prediction is not None),
            "optim/grad_norm": float(report.grad_norm),
            "optim/skipped_steps": float(self._skipped),
            **speed,
            **time_values(ranks, speed["speed/step_s"]),
            "data/wait_s": float(ranks["wait"].mean()) * steps,
            "data/wait_share": float(ranks["wait"].mean()) * steps / time_s,
            "data/replaced_samples": float(ranks["replaced"].sum()),
            "memory/used_mb": float(ranks["memory"].max()),
        }
        self._begin()
        return values

    def _schedule_values(self, state: TrainState, *, has_teacher: bool) -> dict[str, float]:
        lasted = max(state.applied_steps - 1, 0)
        values = {"optim/lr": self._schedules.lr(lasted), "optim/weight_decay": self._schedules.weight_decay(lasted)}
        if has_teacher:
            values["optim/teacher_momentum"] = self._schedules.teacher_momentum(lasted)
        return values

    def _every_rank(
        self, on_device: dict[str, Tensor], on_host: dict[str, float]
    ) -> dict[str, Float64[Tensor, "ranks"]]:
        """Return each value of each rank, exchanged at once."""
        measured = torch.stack([value.double() for value in on_device.values()])
        counted = torch.tensor(list(on_host.values()), dtype=torch.float64, device=self._task.rank_info.device)
        joined = distributed.all_gather(torch.cat([measured, counted])).cpu()
        names = [*on_device, *on_host]
        return dict(zip(names, joined.view(-1, len(names)).unbind(1), strict=True))


def time_values(ranks: dict[str, Float64[Tensor, "ranks"]], step_s: float) -> dict[str, float]:
    """Return what a step's parts took, the mean of ranks, and who kept the others waiting.

    In a step that all ranks end together each takes as long as the slowest; it shows in what a rank does before they
    first exchange gradients, its loader's part among that.
    """
    means = {part: float(ranks[part].mean()) for part in PARTS}
    own = torch.stack([ranks[part] for part in BEFORE_EXCHANGE]).sum(0)
    return {
        **{f"time/{part}_s": mean for part, mean in means.items()},
        # log rows, checkpoints, evaluations
        "time/other_s": max(step_s - sum(means.values()), 0.0),
        "time/slowest_rank": float(own.argmax()),
        "time/slowest_rank_s": float(own.max()),
    }
