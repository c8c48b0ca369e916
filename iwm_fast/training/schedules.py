"""Learning rate, weight decay and teacher momentum as pure functions of the applied step."""

import math
from dataclasses import dataclass
from fractions import Fraction

from iwm_fast.config.run import OptimConfig
from iwm_fast.pipelines.sampling.batch_plan import BEGINNING, StreamStart


def total_steps(config: OptimConfig, num_samples: int, start: StreamStart = BEGINNING) -> int:
    """Return the optimiser steps of the run: its epochs in global batches, the last one begun counts whole.

    Steps before the start of the stream were made with another data set or batch, and count as they are.

    Raises:
        ValueError: if there are no samples.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}; check data.train")
    done = Fraction(start.position, config.global_batch_size)
    return start.step + max(0, math.ceil(_batches(config.epochs, num_samples, config) - done))


def _batches(epochs: float, num_samples: int, config: OptimConfig) -> Fraction:
    # exact in the decimal that was written: 0.1 * 30 in floats is above 3, and its ceiling one step too many
    return Fraction(str(epochs)) * num_samples / config.global_batch_size


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """The three curves of a run, laid out over `schedule_stretch` times its steps and flat after that.

    Steps are applied optimiser steps, from 0; a step beyond the run is fine.

    Source: I-JEPA code (curves); IWM section 3 for the stretch.
    """

    total_steps: int
    """Optimiser steps of the run."""
    warmup_steps: int
    """Steps until the learning rate's peak."""
    config: OptimConfig

    def lr(self, step: int) -> float:
        """Rise linearly from lr_start to lr over the warm-up, then follow a cosine to lr_end."""
        config = self.config
        if step < self.warmup_steps:
            return config.lr_start + (config.lr - config.lr_start) * step / self.warmup_steps
        return _cosine(config.lr, config.lr_end, self._progress(step, self.warmup_steps))

    def weight_decay(self, step: int) -> float:
        """Follow a cosine between the two values of weight_decay."""
        return _cosine(*self.config.weight_decay, self._progress(step, 0))

    def teacher_momentum(self, step: int) -> float:
        """Go linearly between the two values of teacher_momentum."""
        first, last = self.config.teacher_momentum
        return first + (last - first) * self._progress(step, 0)

    def _progress(self, step: int, start: int) -> float:
        """Return the share of the way from `start` to the stretched end, within 0..1."""
        end = self.total_steps * self.config.schedule_stretch
        return min(1.0, max(0.0, (step - start) / (end - start))) if end > start else 1.0


def _cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def build_schedules(config: OptimConfig, num_samples: int, start: StreamStart = BEGINNING) -> Schedules:
    """Lay the curves out for a number of training samples."""
    warmup = round(_batches(config.warmup_epochs, num_samples, config))
    return Schedules(total_steps=total_steps(config, num_samples, start), warmup_steps=warmup, config=config)
