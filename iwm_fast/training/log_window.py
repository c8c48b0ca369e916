"""The log rows of a run: metrics of the steps since the last row, over all ranks."""

import math
import time

import torch
from jaxtyping import Float64
from torch import Tensor

from iwm_fast.monitoring.collapse import collapse_monitors
from iwm_fast.monitoring.step_timer import LOCAL_PHASES, PHASES, StepTimer
from iwm_fast.monitoring.throughput import used_memory_mb
from iwm_fast.runtime import distributed
from iwm_fast.training.loaders import source_epochs
from iwm_fast.training.schedules import Schedules
from iwm_fast.training.step_report import StepReport
from iwm_fast.training.task import TrainTask
from iwm_fast.training.train_state import LogTotals, TrainState


class PhaseTimes:
    """Mean duration of each phase of this rank's steps.

    The times of a step on a GPU are read after the following step, when the device has finished it and reading them
    does not wait.
    """

    def __init__(self) -> None:
        self._pending: StepTimer | None = None
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._num_steps = 0

    def add(self, timer: StepTimer) -> None:
        """Add a step, whose timer has been stopped."""
        previous, self._pending = self._pending, timer
        if previous is not None:
            self._accumulate(previous)
        if not timer.needs_sync:
            self._flush()

    def _flush(self) -> None:
        if self._pending is not None:
            self._accumulate(self._pending)
            self._pending = None

    def _accumulate(self, timer: StepTimer) -> None:
        for phase, seconds in timer.seconds().items():
            self._sums[phase] += seconds
        self._num_steps += 1

    def pop_means(self) -> dict[str, float]:
        """Return the mean seconds of each phase per step, and start again from zero."""
        # Only in the first window can the pending step be the only one; then it is worth waiting for.
        if self._num_steps == 0:
            self._flush()
        means = {phase: total / max(self._num_steps, 1) for phase, total in self._sums.items()}
        self._reset()
        return means


class LogWindow:
    """Collects the steps between two log rows. Times and speeds are those of this process only."""

    def __init__(self, task: TrainTask, schedules: Schedules, carried: LogTotals) -> None:
        """Begin a window; `carried` are the sums of its steps before the run was resumed."""
        self._task: TrainTask = task
        self._schedules: Schedules = schedules
        self._phase_times = PhaseTimes()
        self._reset(carried)

    def _reset(self, carried: LogTotals) -> None:
        self._carried: LogTotals = carried
        self._started: float = time.perf_counter()
        self._num_steps = 0
        self._num_replaced = 0
        self._losses: list[Tensor] = []

    def add(self, report: StepReport) -> None:
        """Add one step, without waiting for the device."""
        self._num_steps += 1
        # The loss of a skipped step need not be finite.
        if report.is_applied:
            self._losses.append(report.loss)
        self._phase_times.add(report.timer)
        self._num_replaced += report.num_replaced

    def totals(self) -> LogTotals:
        """Return the sums so far, over all ranks. Collective: every rank must call it."""
        return self._totals(self._gather({"loss": self._loss_sum()}, {"replaced": float(self._num_replaced)}))

    def _loss_sum(self) -> Float64[Tensor, ""]:
        # In float64, sums of float32 losses are exact, so that a resumed run logs the same mean.
        losses = self._losses or [torch.zeros((), device=self._task.rank_info.device)]
        return torch.stack(losses).double().sum()

    def _totals(self, ranks: dict[str, Float64[Tensor, "ranks"]]) -> LogTotals:
        carried, num_applied = self._carried, len(self._losses)
        return LogTotals(
            # Ranks contribute shares of the loss, so it is their sum.
            loss=carried.loss + float(ranks["loss"].sum()),
            applied_steps=carried.applied_steps + num_applied,
            skipped_steps=carried.skipped_steps + self._num_steps - num_applied,
            replaced_samples=carried.replaced_samples + int(ranks["replaced"].sum()),
        )

    def pop_metrics(self, report: StepReport, state: TrainState) -> dict[str, float]:
        """Return the metrics of a log row over all ranks, and begin the next window.

        Collective: every rank must call it. `report` is the last step of the window.
        """
        monitors = {}
        if report.prediction is not None and report.target_tokens is not None:
            prediction = report.prediction
            monitors = collapse_monitors(prediction.predicted_tokens, report.target_tokens, prediction.patches)
        # Float64 on both sides, because all values travel in one tensor and counts must stay exact.
        on_device = {"loss": self._loss_sum(), **monitors}
        memory = used_memory_mb(self._task.rank_info.device)
        on_host = {"replaced": float(self._num_replaced), "memory": memory, **self._phase_times.pop_means()}
        ranks = self._gather(on_device, on_host)
        totals = self._totals(ranks)
        num_steps, time_s = self._num_steps, time.perf_counter() - self._started
        speed = self._task.meter.values(num_steps, time_s)
        metrics = {
            self._task.loss_name: totals.loss / totals.applied_steps if totals.applied_steps else math.nan,
            # Monitors are measured on each rank's own images.
            **{name: float(ranks[name].mean()) for name in monitors},
            **self._schedule_metrics(state, has_teacher=report.prediction is not None),
            "optim/grad_norm": float(report.grad_norm),
            "optim/skipped_steps": float(totals.skipped_steps),
            **speed,
            **time_metrics(ranks, speed["speed/step_s"]),
            "data/wait_s": float(ranks["wait"].mean()) * num_steps,
            "data/wait_share": float(ranks["wait"].mean()) * num_steps / time_s,
            "data/replaced_samples": float(totals.replaced_samples),
            **source_epochs(self._task.config, self._task.shards, state),
            "memory/used_mb": float(ranks["memory"].max()),
        }
        self._reset(LogTotals())
        return metrics

    def _schedule_metrics(self, state: TrainState, *, has_teacher: bool) -> dict[str, float]:
        # The step has been counted already, so its values are those of one applied step earlier.
        step = max(state.applied_steps - 1, 0)
        metrics = {"optim/lr": self._schedules.lr(step), "optim/weight_decay": self._schedules.weight_decay(step)}
        if has_teacher:
            metrics["optim/teacher_momentum"] = self._schedules.teacher_momentum(step)
        return metrics

    def _gather(self, on_device: dict[str, Tensor], on_host: dict[str, float]) -> dict[str, Float64[Tensor, "ranks"]]:
        """Return each value of each rank. One exchange for all values, and the only wait for the device."""
        device_values = torch.stack([value.double() for value in on_device.values()])
        host_values = torch.tensor(list(on_host.values()), dtype=torch.float64, device=self._task.rank_info.device)
        gathered = distributed.all_gather(torch.cat([device_values, host_values])).cpu()
        names = [*on_device, *on_host]
        return dict(zip(names, gathered.view(-1, len(names)).unbind(1), strict=True))


def time_metrics(ranks: dict[str, Float64[Tensor, "ranks"]], step_s: float) -> dict[str, float]:
    """Return the mean durations of a step's phases over the ranks, and the rank that the others wait for.

    All ranks end a step together, so total times are equal. A slow rank shows in the phases before the first exchange
    of gradients, in which ranks do not wait for each other: loading data, for example.

    Args:
        ranks: seconds of each phase, for each rank.
        step_s: duration of a step, including what happens between steps.
    """
    means = {phase: float(ranks[phase].mean()) for phase in PHASES}
    local = torch.stack([ranks[phase] for phase in LOCAL_PHASES]).sum(0)
    return {
        **{f"time/{phase}_s": mean for phase, mean in means.items()},
        # Time between steps: log rows, checkpoints, evaluations.
        "time/other_s": max(step_s - sum(means.values()), 0.0),
        "time/slowest_rank": float(local.argmax()),
        "time/slowest_rank_s": float(local.max()),
    }
