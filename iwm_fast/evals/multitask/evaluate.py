"""Can one world model do several tasks at once? One predictor with a token for each, beside one predictor per task.

The encoder is frozen, the predictor starts from the run's weights, sees all patches and predicts all, and nothing is to
change. Image number i of a batch belongs to task i modulo their number, so that each task has an equal share. A
predictor of one task alone gets the same images per step of its task and as many steps: what it costs is a T-th, what
it sees of its task is the same.
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.config.finetuning import MultitaskConfig
from iwm_fast.config.loading import to_tree
from iwm_fast.engines.optimizer import scaled_optimizer
from iwm_fast.evals.datasets import label_sets
from iwm_fast.evals.finetuning.networks import Encode, frozen, networks, seeded
from iwm_fast.evals.finetuning.run import (
    FinetuneContext,
    Learnt,
    free_memory,
    micro_batches,
    open_context,
    predict,
    tune,
)
from iwm_fast.evals.finetuning.task import Job
from iwm_fast.evals.finetuning.variants import origin_of
from iwm_fast.evals.multitask.network import Division, TaskInputs, TaskPredictor, weighted_loss
from iwm_fast.evals.multitask.report import LabelledTask, report
from iwm_fast.evals.multitask.task_list import read_task_list
from iwm_fast.evals.results import Result, save_result
from iwm_fast.models.layers import set_drop_path_
from iwm_fast.models.predictor import Predictor
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import check
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, rank_zero_only, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.world_model import WorldModel


def evaluate_multitask(
    config: MultitaskConfig, rank_info: RankInfo | None = None, preemption: Preemption | None = None
) -> Result:
    """Train the predictors and report the accuracy of each task; collective, saved by rank 0.

    Raises:
        ValueError: if the tasks, the run, the shards or the sizes of batches do not fit.
        FileNotFoundError, CheckpointError: if the tasks, the run or the shards cannot be read.
        ShardError: if a sample lacks a label, or a validation sample has one that no training sample has.
        PreemptedError: if a rank was told to stop; the same call goes on.
    """
    rank_info = rank_info or single_process(config.runtime.device)
    with same_error_on_all_ranks():
        specs = read_task_list(config.tasks)
        check_split(config, len(specs), rank_info.world_size)
        model = world_model.load(config.run, rank_info.device)
        model.require_predictor()
        context = open_context("multitask", config, model, rank_info, preemption)
    train, val = context.train, context.val
    tasks = broadcast_from_rank_zero(
        lambda: [LabelledTask(spec, label_sets(train, val, spec.label, classes=spec.classes)) for spec in specs]
    )
    together = _learn("multitask", tasks, config, model, context)
    few = share_of_one(config, len(tasks))
    alone = [_learn(f"alone_{task.spec.name}", [task], few, model, context) for task in tasks] if config.single else []
    result = report(context, tasks, together, alone)
    rank_zero_only(lambda: save_result(config.run, result))
    return result


def check_split(config: MultitaskConfig, num_tasks: int, world_size: int) -> None:
    """Check that batches and micro-batches have an equal share of each task, so that every head has images in each.

    Raises:
        ValueError: if they do not.
    """
    total = config.tune.global_batch_size
    check(total % num_tasks == 0, "tune.global_batch_size", total, f"be a multiple of the {num_tasks} tasks")
    micro, _ = micro_batches(config, world_size)
    name = "runtime.micro_batch_size (tune.global_batch_size / ranks where unset)"
    check(micro % num_tasks == 0, name, micro, f"be a multiple of the {num_tasks} tasks")
    is_mixed = config.augment.mixup > 0 or config.augment.cutmix > 0
    check(not is_mixed or micro % (2 * num_tasks) == 0, name, micro,
          f"be a multiple of twice the {num_tasks} tasks where augment.mixup or augment.cutmix is above 0")  # fmt: skip


def share_of_one(config: MultitaskConfig, num_tasks: int) -> MultitaskConfig:
    """Return the settings under which a task alone has as many steps, and as many images of its in each."""
    tune, micro = config.tune, config.runtime.micro_batch_size
    # An unset warm-up has become a number when the settings were built.
    assert tune.warmup_epochs is not None
    smaller = replace(
        tune,
        global_batch_size=tune.global_batch_size // num_tasks,
        epochs=_part(tune.epochs, num_tasks),
        warmup_epochs=_part(tune.warmup_epochs, num_tasks),
    )
    runtime = replace(config.runtime, micro_batch_size=micro // num_tasks if micro else None)
    return replace(config, tune=smaller, runtime=runtime)


def _part(epochs: float, num_tasks: int) -> float:
    # rounded down: steps are the ceiling of what these epochs are exactly, and a third as a float may be above a third
    return epochs if num_tasks == 1 else math.floor(epochs / num_tasks * 1e12) / 1e12


def _learn(
    name: str, tasks: list[LabelledTask], config: MultitaskConfig, model: WorldModel, context: FinetuneContext
) -> Learnt:
    """Train a predictor, or go on with it, and ask it about the validation images; collective."""
    context = replace(context, task=config)
    student = networks(model, config, context.rank_info)
    assert isinstance(student.predictor, Predictor)
    encode = frozen(student.encoder, context.rank_info)
    with seeded(config.seed):
        module = TaskPredictor(student.predictor, [len(task.sets.classes) for task in tasks])
    set_drop_path_(module, config.tune.drop_path)
    factor, labels = config.tune.pretrained_lr_factor, [task.sets.train.labels for task in tasks]
    # weights tell tasks of one predictor from each other
    weights = [task.spec.weight for task in tasks] if len(tasks) > 1 else [1.0]
    job = Job(
        name=name,
        module=module,
        prepare=Division(labels, share_of_one(config, len(tasks)), encode, context.rank_info),
        loss=lambda scores, inputs: weighted_loss(scores, inputs.labels, weights),
        optimizer=scaled_optimizer(
            module, context.config.optim, lambda part: factor if part.startswith("predictor.") else 1.0
        ),
        origin=origin_of(model.step, model.encoder, model.predictor)
        | {"tasks": [to_tree(task.spec) for task in tasks]},
    )
    tuned = tune(job, context)
    named = predict(partial(_answers, module, encode=encode), context).numpy()
    true = np.stack([task.sets.val.number for task in tasks], axis=1)
    # their memory is given back before the next ones are built
    del job, module
    free_memory(context.rank_info.device)
    return Learnt(measured=named == true, tuned=tuned)


def _answers(module: TaskPredictor, batch: Batch, *, encode: Encode) -> Int64[Tensor, "B tasks"]:
    """Return the class that each task's token and head give each image; the encoder sees it once."""
    tokens, answers = encode(batch.source_view), []
    for number, head in enumerate(module.heads):
        task = torch.full((len(tokens),), number, device=tokens.device)
        inputs = TaskInputs(
            tokens=tokens, action=torch.zeros_like(batch.action), everything=batch.context, task=task, rows=()
        )
        answers.append(head(module.predicted(inputs)).argmax(dim=1))
    return torch.stack(answers, dim=1)
