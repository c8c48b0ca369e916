"""Can one world model do several tasks at once? One predictor with a token for each, beside one predictor per task.

The encoder is frozen, the predictor starts from the run's weights, sees all patches and predicts all, and nothing is to
change. Image number i of a batch belongs to task i modulo their number, so that each task has an equal share. A
predictor of one task alone gets the same images per step of its task and as many steps: what it costs is a T-th, what
it sees of its task is the same.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.distributed import Place, on_rank_zero
from iwm_fast.evals.features import training_shards, validation_shards
from iwm_fast.evals.multitask_network import TaskInputs, TaskPredictor, task_losses, task_rows
from iwm_fast.evals.parts import frozen, here, networks, seeded
from iwm_fast.evals.results import Result, Row, bootstrap, save_result
from iwm_fast.evals.task_list import MEAN, TaskSpec, read_task_list
from iwm_fast.evals.tune_config import MultitaskConfig
from iwm_fast.evals.tuning import Job, Tuned, micro_batches, predict, run_config, task_folder, tune
from iwm_fast.messages import found_by_every_rank
from iwm_fast.models.encoder import Encoder
from iwm_fast.optim import scaled_optimizer
from iwm_fast.world_model import WorldModel
from pipelines.batch import Batch
from pipelines.config import check
from pipelines.labels import Labels, read_labels
from pipelines.shards import ShardSet


@dataclass(frozen=True, kw_only=True)
class LabelledTask:
    """A task and the labels of both sets."""

    spec: TaskSpec
    train: Labels
    val: Labels

    @property
    def chance(self) -> float:
        """What a guess would give that takes each class for equally common."""
        return 1 / len(self.train.classes)


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What a predictor of one or several tasks has come to."""

    correct: Bool[np.ndarray, "images tasks"]
    """Whether it names each validation image rightly."""
    tuned: Tuned


def evaluate_multitask(config: MultitaskConfig) -> Result:
    """Train the predictors and report the accuracy of each task; collective, saved by rank 0.

    Raises:
        ValueError: if the tasks, the run, the shards or the sizes of batches do not fit.
        FileNotFoundError, CheckpointError: if the tasks, the run or the shards cannot be read.
        ShardError: if a sample lacks a label, or a validation sample has one that no training sample has.
        PreemptedError: if a rank was told to stop; the same call goes on.
    """
    place = here(config)
    with found_by_every_rank():
        specs = read_task_list(config.tasks)
        check_split(config, len(specs), place.world_size)
        model = world_model.load(config.run, place.device)
        model.require_predictor()
        train, val = training_shards(model, config.data), validation_shards(model, config.data)
    tasks = on_rank_zero(lambda: [_labelled(spec, train, val) for spec in specs])
    learn = Learner(config, model, place, train=train, val=val)
    together = learn("multitask", tasks)
    alone = [learn(f"alone_{task.spec.name}", [task]) for task in tasks] if config.single else []
    result = _report(config, model, tasks, together, alone)
    on_rank_zero(lambda: save_result(config.run, result))
    return result


def check_split(config: MultitaskConfig, num_tasks: int, world_size: int) -> None:
    """Check that batches and micro-batches have an equal share of each task, so that every head has images in each.

    Raises:
        ValueError: if they do not.
    """
    total = config.tune.global_batch_size
    check(total % num_tasks == 0, "tune.global_batch_size", total, f"be a multiple of the {num_tasks} tasks")
    micro, _ = micro_batches(config, world_size)
    name = "runtime.micro_batch_size" if config.runtime.micro_batch_size else "tune.global_batch_size / ranks"
    check(micro % num_tasks == 0, name, micro, f"be a multiple of the {num_tasks} tasks")


def share_of_one(config: MultitaskConfig, num_tasks: int) -> MultitaskConfig:
    """Return the settings under which a task alone has as many steps, and as many images of its in each."""
    tune, micro = config.tune, config.runtime.micro_batch_size
    smaller = replace(
        tune,
        global_batch_size=tune.global_batch_size // num_tasks,
        epochs=tune.epochs / num_tasks,
        warmup_epochs=tune.warmup_epochs / num_tasks,
    )
    runtime = replace(config.runtime, micro_batch_size=micro // num_tasks if micro else None)
    return replace(config, tune=smaller, runtime=runtime)


def _labelled(spec: TaskSpec, train: ShardSet, val: ShardSet) -> LabelledTask:
    known = read_labels(train, spec.label, classes=spec.classes)
    return LabelledTask(spec=spec, train=known, val=read_labels(val, spec.label, classes=known.classes))


class Learner:
    """Trains predictors of one or several tasks on one run and one set of shards."""

    def __init__(
        self, config: MultitaskConfig, model: WorldModel, place: Place, *, train: ShardSet, val: ShardSet
    ) -> None:
        self._config, self._model, self._place = config, model, place
        self._train, self._val = train, val

    def __call__(self, name: str, tasks: list[LabelledTask]) -> Learnt:
        """Train one predictor, or go on with it, and ask it about the validation images; collective."""
        config, model, place = self._config, self._model, self._place
        student = networks(model, config, place)
        encoder = frozen(student.encoder, place)
        with seeded(config.seed):
            module = TaskPredictor(student.predictor, [len(task.train.classes) for task in tasks])
        folder = task_folder(config.run, "multitask", config.name)
        settings = config if name == "multitask" else share_of_one(config, self._num_tasks)
'''
