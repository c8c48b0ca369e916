"""The method in thirty lines.

From the visible patches of a source view and the action, predict the teacher's tokens of the target view. Then update
encoder and predictor by gradient descent, and the teacher by an exponential moving average of the encoder.
"""

from collections.abc import Iterator

from torch import Tensor

from iwm_fast.engines.base import Engine
from iwm_fast.pipelines.batch import Batch
from iwm_fast.training.objective import Objective
from iwm_fast.training.schedules import Schedules
from iwm_fast.training.step_report import StepRecorder, StepReport
from iwm_fast.training.teacher import Teacher

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
    record = StepRecorder(next(teacher.encoder.parameters()).device)
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
    # After a skipped step the encoder has not changed, and averaging it again would move the teacher.
    if outcome.applied:
        teacher.update(encoder_parameters(engine), schedules.teacher_momentum(applied_steps))
    return record.report(outcome, prediction, target_tokens)
