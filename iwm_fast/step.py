"""The method in thirty lines: read this file first.

From the visible patches of a source view and the action, predict the teacher's tokens of the target view; then let
the teacher follow the encoder.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from iwm_fast.engine import Engine
from iwm_fast.models.student import Prediction
from iwm_fast.objective import Objective
from iwm_fast.schedules import Schedules
from iwm_fast.teacher import Teacher
from pipelines.batch import Batch


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What one optimiser step did; tensors stay on the device until they are logged."""

    loss: Tensor
    """This rank's share of the loss, a scalar: summed over ranks it is the loss of the global batch."""
    grad_norm: float | Tensor
    """Global norm before clipping."""
    prediction: Prediction
    """Of the last micro-batch, for the collapse monitors."""
    target_tokens: Float[Tensor, "T D"]
    """What it is compared with."""
    is_applied: bool
    """False if a non-finite gradient left weights and teacher as they were."""
    wait_s: float
    """Seconds spent waiting for the loader."""
    num_replaced: int
    """Images of this rank that stand in for others that could not be decoded."""
    keys: tuple[str, ...]
    """Samples of the last micro-batch, to name in errors."""


ENCODER = "encoder."


def encoder_parameters(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield the trained encoder's whole weights under their names in the encoder."""
    for name, parameter in engine.named_parameters():
        if name.startswith(ENCODER):
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
    losses, wait_s, num_replaced = [], 0.0, 0
    for _ in range(accumulation):
        asked = time.perf_counter()
        batch = next(batches)
        wait_s += time.perf_counter() - asked
        num_replaced += int((batch.sample != batch.planned).sum())
        prediction = engine.forward(batch)
        target_tokens = teacher.encode(batch.target_view, prediction.patches)
        loss = objective(prediction, target_tokens, prediction.patches)
        engine.backward(loss)
        losses.append(loss.detach())
    outcome = engine.step()
    if outcome.applied:
        teacher.update(encoder_parameters(engine), schedules.teacher_momentum(applied_steps))
    return StepReport(
        loss=torch.stack(losses).sum(),
        grad_norm=outcome.grad_norm,
        prediction=prediction,
        target_tokens=target_tokens,
        is_applied=outcome.applied,
        wait_s=wait_s,
        num_replaced=num_replaced,
        keys=batch.key,
    )
