"""The method in thirty lines: read this file first.

From the visible patches of a source view and the action, predict the teacher's tokens of the target view. Then update
encoder and predictor by gradient descent, and the teacher by an exponential moving average of the encoder.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from iwm_fast.engines.base import Engine
from iwm_fast.models.student import Prediction
from iwm_fast.monitoring.step_timer import StepTimer
from iwm_fast.pipelines.batch import Batch
from iwm_fast.training.objective import Objective
from iwm_fast.training.schedules import Schedules
from iwm_fast.training.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Outcome of one optimiser step. Tensors stay on the device until they are logged, so that no step waits for it."""

    losses: Float[Tensor, "accumulation"]
    """Contribution of each micro-batch of this rank; their sum over all ranks is the loss of the global batch."""
    grad_norm: float | Tensor
    """Global gradient norm before clipping."""
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


_ENCODER_PREFIX = "encoder."


def encoder_parameters(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """Yield the unpartitioned weights of the trained encoder with their names in the encoder.

    Collective: every rank must exhaust the iterator, because ZeRO stage 3 gathers each weight.
    """
    for name, parameter in engine.named_parameters(_ENCODER_PREFIX):
        yield name.removeprefix(_ENCODER_PREFIX), parameter


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
    """Run one optimiser step over `accumulation` micro-batches.

    Encoder and predictor are updated by gradient descent, the teacher by EMA of the encoder. `applied_steps` is the
    position in the schedules. Collective: every rank must call it.
    """
    engine.set_hyperparameters(lr=schedules.lr(applied_steps), weight_decay=schedules.weight_decay(applied_steps))
    losses, keys, num_replaced = [], [], 0
    timer = StepTimer(next(teacher.encoder.parameters()).device)
    for _ in range(accumulation):
        timer.begin("wait")
        batch = next(batches)
        timer.begin("forward")
        prediction = engine.forward(batch)
        timer.begin("teacher")
        target_tokens = teacher.encode(batch.target_view, prediction.patches)
        timer.begin("backward")
        loss = objective(prediction, target_tokens, prediction.patches)
        engine.backward(loss)
        losses.append(loss.detach())
        keys.append(batch.key)
        num_replaced += int((batch.sample != batch.scheduled_sample).sum())
    timer.begin("optimizer")
    outcome = engine.step()
    timer.begin("teacher_update")
    # After a skipped step the encoder has not changed, and averaging it again would move the teacher.
    if outcome.applied:
        teacher.update(encoder_parameters(engine), schedules.teacher_momentum(applied_steps))
    timer.stop()
    return StepReport(
        losses=torch.stack(losses),
        grad_norm=outcome.grad_norm,
        prediction=prediction,
        target_tokens=target_tokens,
        is_applied=outcome.applied,
        timer=timer,
        num_replaced=num_replaced,
        keys=keys,
    )
