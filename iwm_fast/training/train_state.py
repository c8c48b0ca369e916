"""Counters of a training run, which a checkpoint saves beside the weights."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.pipelines.sampling.batch_plan import BEGINNING, StreamStart

# Fields of `TrainState` that a checkpoint stores as they are.
_PLAIN_COUNTERS = ("time_s", "timed_steps", "timed_s", "skipped_in_a_row")


@dataclass(frozen=True, kw_only=True)
class TrainStats:
    """The cost of a training run."""

    num_tuned: int
    """Number of trained parameters."""
    images_per_s: float | None
    """Speed over all ranks, without the first step after each start; None if there was no other step."""
    time_s: float
    """Duration of all steps over all starts, without log rows, checkpoints and evaluations."""
    steps: int
    """Number of optimiser steps."""

    def columns(self) -> dict[str, Any]:
        """Return the columns of a result row, by name."""
        return {"num_tuned": self.num_tuned, "images_per_s": self.images_per_s, "time_s": self.time_s}


@dataclass(frozen=True, kw_only=True)
class LogTotals:
    """Sums over the steps since the last log row, over all ranks."""

    loss: float = 0.0
    """Sum of the losses of the applied steps, which are finite."""
    applied_steps: int = 0
    skipped_steps: int = 0
    replaced_samples: int = 0
    """Images that replace undecodable ones."""


@dataclass(frozen=True, kw_only=True)
class BestStep:
    """The step at which the metric of `output.keep_best` was best so far; its checkpoint is kept."""

    metric: str
    value: float
    step: int


@dataclass
class TrainState:
    """Counters of a training run, updated after each step."""

    step: int = 0
    """Optimiser steps attempted; drives the data."""
    applied_steps: int = 0
    """Steps that changed the weights; drives schedules and teacher."""
    start: StreamStart = BEGINNING
    """Position at which the stream of samples began."""
    run_id: str = ""
    """Identifier of the run, which stays the same when it is resumed."""
    time_s: float = 0.0
    """Duration of all steps."""
    timed_steps: int = 0
    """Steps that count for the speed: all but the first after each start, which fills caches."""
    timed_s: float = 0.0
    """Duration of the steps that count for the speed."""
    skipped_in_a_row: int = 0
    """Skipped steps since the last applied one."""
    log_totals: LogTotals = LogTotals()
    """Sums for the next log row, brought up to date when a checkpoint is written."""
    changes: list[dict[str, Any]] = field(default_factory=list)
    """Settings that changed when the run was resumed: `step`, `setting`, `from` and `to` of each change."""
    best: BestStep | None = None
    """The best evaluation so far, None without `output.keep_best`."""

    def record_evaluation(self, metric: str, value: float) -> bool:
        """Return whether the current step is the best one so far; NaN never is.

        A best value of another metric is ignored. Larger values are better, as they are for all metrics of evaluations.
        """
        best = self.best if self.best and self.best.metric == metric else None
        is_best = math.isfinite(value) and (best is None or value > best.value)
        if is_best:
            self.best = BestStep(metric=metric, value=value, step=self.step)
        return is_best

    def record_step(self, *, is_applied: bool, time_s: float, is_first: bool) -> None:
        """Count one step; `is_first` marks the first step after a start."""
        self.step += 1
        self.applied_steps += is_applied
        self.time_s += time_s
        if not is_first:
            self.timed_steps += 1
            self.timed_s += time_s

    def counters(self, num_samples: int) -> dict[str, Any]:
        """Return what a checkpoint has no field for, in a form that JSON can represent."""
        return {
            "stream": asdict(self.start),
            "num_samples": num_samples,
            "log_totals": asdict(self.log_totals),
            "changes": self.changes,
            "best": self.best and asdict(self.best),
            **{name: getattr(self, name) for name in _PLAIN_COUNTERS},
        }

    @classmethod
    def from_checkpoint(cls, saved: Checkpoint) -> "TrainState":
        """Return the state in which a checkpoint was written."""
        counters = saved.counters
        return cls(
            step=saved.step,
            applied_steps=saved.applied_steps,
            run_id=saved.run_id,
            # Checkpoints of earlier versions lack some of these.
            start=StreamStart(**counters.get("stream", {})),
            log_totals=LogTotals(**counters.get("log_totals", {})),
            changes=list(counters.get("changes", [])),
            best=BestStep(**counters["best"]) if counters.get("best") else None,
            **{name: counters[name] for name in _PLAIN_COUNTERS if name in counters},
        )

    def stats(self, num_tuned: int, global_batch_size: int) -> TrainStats:
        """Return the cost of training so far."""
        images_per_s = self.timed_steps * global_batch_size / self.timed_s if self.timed_s else None
        return TrainStats(num_tuned=num_tuned, images_per_s=images_per_s, time_s=self.time_s, steps=self.step)
