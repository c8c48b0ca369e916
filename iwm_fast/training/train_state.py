"""How far training has come: what a checkpoint keeps beside the weights."""

from dataclasses import asdict, dataclass
from typing import Any

from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.pipelines.sampling.batch_plan import BEGINNING, StreamStart


@dataclass(frozen=True, kw_only=True)
class TrainStats:
    """What training has cost."""

    num_tuned: int
    """Parameters that were trained."""
    images_per_s: float | None
    """Over all ranks, without the first step after each start; None if there was no other."""
    time_s: float
    """All steps, over all starts; without log rows, checkpoints and evaluations."""
    steps: int
    """Optimiser steps."""

    def columns(self) -> dict[str, Any]:
        """Return what a row of results says of it."""
        return {"num_tuned": self.num_tuned, "images_per_s": self.images_per_s, "time_s": self.time_s}


@dataclass
class TrainState:
    """Counters of a training run, updated after each step."""

    step: int = 0
    """Optimiser steps attempted; drives the data."""
    applied_steps: int = 0
    """Steps that changed the weights; drives schedules and teacher."""
    start: StreamStart = BEGINNING
    """Where the stream of samples began."""
    run_id: str = ""
    """Name of the run, the same however often it is resumed."""
    time_s: float = 0.0
    """Duration of all steps."""
    timed_steps: int = 0
    """Steps without the first one after each start, which fills caches."""
    timed_s: float = 0.0
    """Duration of those."""

    def count(self, *, is_applied: bool, time_s: float, is_first: bool) -> None:
        """Count one step that took so many seconds; `is_first` says whether it is the first one after a start."""
        self.step += 1
        self.applied_steps += is_applied
        self.time_s += time_s
        if not is_first:
            self.timed_steps += 1
            self.timed_s += time_s

    def counters(self, num_samples: int) -> dict[str, Any]:
        """Return what a checkpoint has no other field for, fit for JSON."""
        times = {name: value for name, value in asdict(self).items() if "time" in name}
        return {"stream": asdict(self.start), "num_samples": num_samples, **times}

    @classmethod
    def from_checkpoint(cls, saved: Checkpoint) -> "TrainState":
        """Return the state that a checkpoint was written at."""
        kept = saved.counters
        return cls(
            step=saved.step,
            applied_steps=saved.applied_steps,
            # checkpoints of finetuning did not keep the stream once, those of pretraining no times
            start=StreamStart(**kept.get("stream", {})),
            run_id=saved.run_id,
            **{name: kept[name] for name in ("time_s", "timed_steps", "timed_s") if name in kept},
        )

    def stats(self, num_tuned: int, global_batch_size: int) -> TrainStats:
        """Return what training has cost so far."""
        speed = self.timed_steps * global_batch_size / self.timed_s if self.timed_s else None
        return TrainStats(num_tuned=num_tuned, images_per_s=speed, time_s=self.time_s, steps=self.step)
