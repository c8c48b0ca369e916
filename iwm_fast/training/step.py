"""The method in thirty lines: read this file first.

From the visible patches of a source view and the action, predict the teacher's tokens of the target view; then let
the teacher follow the encoder.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from iwm_fast.engines.base import Engine, StepOutcome
from iwm_fast.models.student import Prediction
from iwm_fast.monitoring.step_timer import StepTimer
from iwm_fast.pipelines.batch import Batch
from iwm_fast.training.objective import Objective
from iwm_fast.training.schedules import Schedules
from iwm_fast.training.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimiser step did; tensors stay on the device until they are logged."""

    losses: Float[Tensor, "accumulation"]
    """This rank's shares of the loss by micro-batch: summed over them and over ranks, the loss of the global batch."""
    grad_norm: float | Tensor
    """Global norm before clipping."""
    is_applied: bool
    """False if a non-finite gradient left weights and teacher as they were."""
    timer: StepTimer
    """What its parts took, waiting for the loader first."""
    num_replaced: int
    """Images of this rank that stand in for others that could not be decoded."""
    keys: list[tuple[str, ...]]
    """Samples of each micro-batch, to name in errors."""
    prediction: Prediction | None = None
    """Of the last micro-batch, for the collapse monitors; None if no teacher's tokens are predicted."""
    target_tokens: Float[Tensor, "T D"] | None = None
    """What it is compared with."""

    @property
    def loss(self) -> Tensor:
        """Share of this rank in the loss, a scalar."""
        return self.losses.sum()

    def suspect_sample_keys(self) -> list[str]:
        """Return the samples that may have spoilt this step: those whose loss is not finite, all if none is known."""
        is_bad = (~self.losses.isfinite()).tolist()
        chosen = [keys for keys, bad in zip(self.keys, is_bad, strict=True) if bad or not any(is_bad)]
        return [key for keys in chosen for key in keys]


class StepRecord:
    """What one optimiser step has done so far: its micro-batches and what they took."""

    def __init__(self, device: torch.device) -> None:
        self.timer = StepTimer(device)
        self._losses: list[Tensor] = []
        self._keys: list[tuple[str, ...]] = []
        self._num_replaced = 0

    def next_batch(self, batches: Iterator[Batch]) -> Batch:
        """Wait for the next micro-batch; its forward pass begins."""
        self.timer.begin("wait")
        batch = next(batches)
        self._keys.append(batch.key)
        self._num_replaced += int((batch.sample != batch.scheduled_sample).sum())
        self.timer.begin("forward")
        return batch

    def backward(self, engine: Engine, loss: Float[Tensor, ""]) -> None:
        """Add the gradients of the micro-batch's loss."""
        engine.backward(loss)
        self._losses.append(loss.detach())

    def report(
        self, outcome: StepOutcome, prediction: Prediction | None = None, target_tokens: Tensor | None = None
    ) -> StepReport:
        """End the step and return its report, with what was predicted of the last micro-batch, and of what."""
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


ENCODER = "encoder."


def encoder_parameters(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained encoder's whole weights under their names in the encoder."""
    for name, parameter in engine.named_parameters(ENCODER):
        yield name.removeprefix(ENCODER), parameter


def train_step(
    engine: Engine,
    teacher: Teacher,
    objective: Objective,
    batches: Iterator[Batch],
    schedules: Schedules,
    *,
    applied_steps: int,
    accumulation: int,
) -> StepReport:
    """Run one optimiser step: `accumulation` micro-batches, then encoder and predictor by gradient, teacher by EMA."""
    engine.set_hyperparameters(lr=schedules.lr(applied_steps), weight_decay=schedules.weight_decay(applied_steps))
    record = StepRecord(next(teacher.encoder.parameters()).device)
    for _ in range(accumulation):
        batch = record.next_batch(batches)
        prediction = engine.forward(batch)
        record.timer.begin("teacher")
        target_tokens = teacher.encode(batch.target_view, prediction.patches)
        record.timer.begin("backward")
        record.backward(engine, objective(prediction, target_tokens, prediction.patches))
    record.timer.begin("optimizer")
    outcome = engine.step()
    record.timer.begin("teacher_update")
    if outcome.applied:
        teacher.update(encoder_parameters(engine), schedules.teacher_momentum(applied_steps))
    return record.report(outcome, prediction, target_tokens)
