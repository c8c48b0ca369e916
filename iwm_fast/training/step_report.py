"""What an optimiser step reports about itself, for logs, monitors and the guard against non-finite steps."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from iwm_fast.engines.base import Engine, StepOutcome
from iwm_fast.models.student import Prediction
from iwm_fast.monitoring.step_timer import StepTimer
from iwm_fast.pipelines.batch import Batch


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Outcome of one optimiser step. Tensors stay on the device until they are logged."""

    losses: Float[Tensor, "accumulation"]
    """Contribution of each micro-batch of this rank; their sum over all ranks is the loss of the global batch."""
    grad_norm: float | Tensor
    """Global gradient norm before clipping, as a number or a scalar tensor; infinite in a skipped step."""
    is_applied: bool
    """False if the step was skipped because of a non-finite gradient, with weights and teacher unchanged."""
    timer: StepTimer
    """Durations of the phases of the step."""
    num_replaced: int
    """Images of this rank that replace undecodable ones."""
    keys: list[tuple[str, ...]]
    """Sample keys of each micro-batch, for error messages."""
    prediction: Prediction | None = None
    """Student output for the last micro-batch, for the collapse monitors; None in finetuning, which has no teacher."""
    target_tokens: Float[Tensor, "T D"] | None = None
    """The teacher's tokens that `prediction` is compared with."""

    @property
    def loss(self) -> Tensor:
        """Contribution of this rank to the loss of the global batch, a scalar."""
        return self.losses.sum()

    def suspect_sample_keys(self) -> list[str]:
        """Return the samples that may have caused a non-finite step.

        These are the samples of micro-batches with a non-finite loss, or all samples if every loss is finite and only
        a gradient is not.
        """
        is_bad = (~self.losses.isfinite()).tolist()
        suspects = [keys for keys, bad in zip(self.keys, is_bad, strict=True) if bad or not any(is_bad)]
        return [key for keys in suspects for key in keys]


class StepRecorder:
    """Collects, micro-batch by micro-batch, what the `StepReport` of an optimiser step contains."""

    def __init__(self, device: torch.device) -> None:
        self.timer = StepTimer(device)
        self._losses: list[Tensor] = []
        self._keys: list[tuple[str, ...]] = []
        self._num_replaced = 0

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Wait for the next micro-batch and return it, with the timer in its forward phase."""
        self.timer.begin("wait")
        batch = next(batches)
        # First of all, because from here on the loader's threads compete for the cores, which is not waiting for data.
        self.timer.begin("forward")
        self._keys.append(batch.key)
        self._num_replaced += int((batch.sample != batch.scheduled_sample).sum())
        return batch

    def backward(self, engine: Engine, loss: Float[Tensor, ""]) -> None:
        """Add the gradients of a micro-batch's loss to those of the step."""
        engine.backward(loss)
        self._losses.append(loss.detach())

    def report(
        self, outcome: StepOutcome, prediction: Prediction | None = None, target_tokens: Tensor | None = None
    ) -> StepReport:
        """End the step and return its report.

        `prediction` and `target_tokens` are those of the last micro-batch, if the step predicts a teacher's tokens.
        """
        self.timer.stop()
        return StepReport(
            losses=torch.stack(self._losses),
            grad_norm=outcome.grad_norm,
            is_applied=outcome.applied,
            timer=self.timer,
            num_replaced=self._num_replaced,
            keys=self._keys,
            prediction=prediction,
            target_tokens=target_tokens,
        )
