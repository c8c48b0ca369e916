"""Learning rate, weight decay and teacher momentum as pure functions of the number of applied steps."""

import math
from dataclasses import dataclass
from fractions import Fraction

from iwm_fast.config.run import OptimConfig
from iwm_fast.pipelines.sampling.batch_plan import BEGINNING, StreamStart


def total_steps(config: OptimConfig, num_samples: int, start: StreamStart = BEGINNING) -> int:
    """Return the number of optimiser steps of the run: its epochs divided into global batches, rounded up.

    Steps before `start` were made with other data or another batch size. They count as they are, and the remaining
    epochs are divided into batches of the current size.

    Raises:
        ValueError: if there are no samples.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}; check data.train")
    batches_before = Fraction(start.position, config.global_batch_size)
    return start.step + max(0, math.ceil(_num_batches(config.epochs, num_samples, config) - batches_before))


def _num_batches(epochs: float, num_samples: int, config: OptimConfig) -> Fraction:
    # Exact arithmetic on the decimal number that the user wrote: in floats, 0.1 * 30 is slightly above 3, and rounding
    # it up would add a step.
    return Fraction(str(epochs)) * num_samples / config.global_batch_size


@dataclass(frozen=True, kw_only=True)
class Schedules:
    """The three schedules of a run, which span `schedule_stretch` times its steps and are constant after that.

    Their argument is the number of applied optimiser steps, from 0; it may lie beyond the end of the run.

    Source: I-JEPA code for the curves, V-JEPA for the stretch.
    """

    total_steps: int
    """Optimiser steps of the run."""
    warmup_steps: int
    """Steps until the learning rate reaches its peak."""
    config: OptimConfig

    def lr(self, step: int) -> float:
        """Return the learning rate: linear from lr_start to lr in the warm-up, then a cosine to lr_end."""
        config = self.config
        if step < self.warmup_steps:
            return config.lr_start + (config.lr - config.lr_start) * step / self.warmup_steps
        return _cosine(config.lr, config.lr_end, self._progress(step, self.warmup_steps))

    def weight_decay(self, step: int) -> float:
        """Return the weight decay, a cosine between the two values of the setting."""
        return _cosine(*self.config.weight_decay, self._progress(step, 0))

    def teacher_momentum(self, step: int) -> float:
        """Return the EMA coefficient of the teacher, linear between the two values of the setting."""
        first, last = self.config.teacher_momentum
        return first + (last - first) * self._progress(step, 0)

    def _progress(self, step: int, start: int) -> float:
        """Return how far a step is on the way from `start` to the stretched end, in 0..1."""
        # `end` is not after `start` if the run is shorter than its warm-up.
        end = self.total_steps * self.config.schedule_stretch
        return min(1.0, max(0.0, (step - start) / (end - start))) if end > start else 1.0


def _cosine(first: float, last: float, progress: float) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * progress)) / 2


def build_schedules(config: OptimConfig, num_samples: int, start: StreamStart = BEGINNING) -> Schedules:
    """Build the schedules of a run on `num_samples` training samples, whose stream of samples begins at `start`."""
    # An unset warm-up has become a number when the settings were built.
    assert config.warmup_epochs is not None
    warmup = round(_num_batches(config.warmup_epochs, num_samples, config))
    return Schedules(total_steps=total_steps(config, num_samples, start), warmup_steps=warmup, config=config)
