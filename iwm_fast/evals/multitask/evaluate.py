"""Compares a single predictor for several tasks, with a token for each task, with one predictor for each task.

The encoder is frozen. The predictor starts from the run's weights, sees all patches, and predicts all patches under the
null action. Image i of a batch belongs to task i modulo the number T of tasks, so that all tasks have equal shares.
A predictor for a single task is trained with as many steps and as many images of its task per step, which is a T-th of
the images and of the cost.
"""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from iwm_fast.config.finetuning import MultitaskConfig
from iwm_fast.config.loading import config_to_dict
from iwm_fast.engines.optimizer import build_scaled_optimizer
from iwm_fast.evals.datasets import label_sets, require_readable
from iwm_fast.evals.finetuning.layer_decay import train_last_blocks_
from iwm_fast.evals.finetuning.networks import Encode, build_networks, freeze_encoder, load_model, seeded_init
from iwm_fast.evals.finetuning.run import (
    FinetuneContext,
    TrainedVariant,
    free_memory,
    map_validation_images,
    open_context,
    split_global_batch,
    train_job,
)
from iwm_fast.evals.finetuning.task import LABELS_ENTRY, Job
from iwm_fast.evals.finetuning.variants import describe_origin, require_arms_fit
from iwm_fast.evals.multitask.network import TaskBatcher, TaskInputs, TaskPredictor, weighted_loss
from iwm_fast.evals.multitask.report import LabelledTask, make_result
from iwm_fast.evals.multitask.task_list import read_task_list
from iwm_fast.evals.results import Result, save_result
from iwm_fast.models.layers import set_drop_path_
from iwm_fast.models.predictor import Predictor
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import require
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, rank_zero_only, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.world_model import WorldModel


def evaluate_multitask(
    config: MultitaskConfig, rank_info: RankInfo | None = None, preemption: Preemption | None = None
) -> Result:
    """Train or resume the predictors, and return and save their accuracies. Collective: every rank must call it.

    Raises:
        ValueError: if the tasks, the run, the shards or the batch sizes do not fit.
        FileNotFoundError, CheckpointError: if the task list, the run or the shards cannot be read.
        ShardError: if a sample has no label, or a validation sample has a label that no training sample has.
        PreemptedError: if a rank was asked to stop; calling this again resumes.
    """
    rank_info = rank_info or single_process(config.runtime.device)
    with same_error_on_all_ranks():
        specs = read_task_list(config.tasks)
        check_batch_split(config, len(specs), rank_info.world_size)
        model = load_model(config, rank_info)
        model.require_predictor()
        require_arms_fit(["predictor"], config.tune, model.config.model)
        context = open_context("multitask", config, model, rank_info, preemption)
    train, val = context.train, context.val

    def read_tasks() -> list[LabelledTask]:
        tasks = [LabelledTask(spec, label_sets(train, val, spec.label, classes=spec.classes)) for spec in specs]
        # Training replaces bad images.
        require_readable((val, np.arange(val.num_samples)))
        return tasks

    tasks = broadcast_from_rank_zero(read_tasks)
    multitask = _train_predictor("multitask", tasks, config, model, context)
    single, alone = single_task_settings(config, len(tasks)), tasks if config.single else []
    single_tasks = [_train_predictor(f"alone_{task.spec.name}", [task], single, model, context) for task in alone]
    result = make_result(context, tasks, multitask, single_tasks)
    rank_zero_only(lambda: save_result(config.run, result))
    return result


def check_batch_split(config: MultitaskConfig, num_tasks: int, world_size: int) -> None:
    """Check that each batch and micro-batch contains equally many images of all tasks, so that all heads are trained.

    Raises:
        ValueError: if the batch sizes do not allow it.
    """
    total = config.tune.global_batch_size
    require(total % num_tasks == 0, "tune.global_batch_size", total, f"be a multiple of the {num_tasks} tasks")
    micro_batch_size, _ = split_global_batch(config, world_size)
    name = "runtime.micro_batch_size (by default tune.global_batch_size / ranks)"
    require(micro_batch_size % num_tasks == 0, name, micro_batch_size, f"be a multiple of the {num_tasks} tasks")
    is_mixed = config.augment.mixup > 0 or config.augment.cutmix > 0
    require(not is_mixed or micro_batch_size % (2 * num_tasks) == 0, name, micro_batch_size,
          f"be a multiple of twice the {num_tasks} tasks if augment.mixup or augment.cutmix is above 0")  # fmt: skip


def single_task_settings(config: MultitaskConfig, num_tasks: int) -> MultitaskConfig:
    """Return the settings that train one of the tasks alone, with the same steps and the same images of it per step."""
    tune, micro_batch_size = config.tune, config.runtime.micro_batch_size
    # An unset warm-up has become a number when the settings were built.
    assert tune.warmup_epochs is not None
    tune = replace(
        tune,
        global_batch_size=tune.global_batch_size // num_tasks,
        epochs=_divide_epochs(tune.epochs, num_tasks),
        warmup_epochs=_divide_epochs(tune.warmup_epochs, num_tasks),
    )
    runtime = replace(config.runtime, micro_batch_size=micro_batch_size // num_tasks if micro_batch_size else None)
    return replace(config, tune=tune, runtime=runtime)


def _divide_epochs(epochs: float, num_tasks: int) -> float:
    # Steps are the ceiling of epochs times steps per epoch. A quotient that the float format rounds up would therefore
    # give one step too many, so the quotient is rounded down at the twelfth decimal.
    return epochs if num_tasks == 1 else math.floor(epochs / num_tasks * 1e12) / 1e12


def _train_predictor(
    name: str, tasks: list[LabelledTask], settings: MultitaskConfig, model: WorldModel, context: FinetuneContext
) -> TrainedVariant:
    """Train or resume a predictor for these tasks and evaluate it. Collective: every rank must call it."""
    context = replace(context, settings=settings)
    student = build_networks(model, settings, context.rank_info)
    assert isinstance(student.predictor, Predictor)
    encode = freeze_encoder(student.encoder, context.rank_info)
    with seeded_init(settings.seed):
        module = TaskPredictor(student.predictor, [len(task.sets.classes) for task in tasks])
    sizes = context.model_config.model
    train_last_blocks_(module, settings.tune.blocks, sizes.encoder.depth, sizes.predictor.depth)
    set_drop_path_(module, settings.tune.drop_path)
    factor, labels = settings.tune.pretrained_lr_factor, [task.sets.train.labels for task in tasks]
    # Weights balance the tasks of one predictor, so the weight of a single task is ignored.
    weights = [task.spec.weight for task in tasks] if len(tasks) > 1 else [1.0]
    job = Job(
        name=name,
        module=module,
        prepare=TaskBatcher(labels, single_task_settings(settings, len(tasks)), encode, context.rank_info),
        loss=lambda logits, inputs: weighted_loss(logits, inputs.labels, weights),
        optimizer=build_scaled_optimizer(
            module, context.run_config.optim, lambda parameter: factor if parameter.startswith("predictor.") else 1.0
        ),
        origin=describe_origin(model.step, model.encoder, model.predictor)
        | {"tasks": [config_to_dict(task.spec) for task in tasks], LABELS_ENTRY: [task.digest for task in labels]},
    )
    stats = train_job(job, context)
    predicted = map_validation_images(partial(_predict_classes, module, encode=encode), context).numpy()
    true = np.stack([task.sets.val.number for task in tasks], axis=1)
    # The references are dropped first, because otherwise the next predictor would be built while this one is in memory.
    del job, module
    free_memory(context.rank_info.device)
    return TrainedVariant(per_image=predicted == true, stats=stats)


def _predict_classes(module: TaskPredictor, batch: Batch, *, encode: Encode) -> Int64[Tensor, "B tasks"]:
    """Return the class of each image for each task; the encoder runs once for all tasks."""
    tokens, action, classes = encode(batch.source_view), torch.zeros_like(batch.action), []
    for number, head in enumerate(module.heads):
        task = torch.full((len(tokens),), number, device=tokens.device)
        inputs = TaskInputs(tokens=tokens, action=action, patches=batch.context, task=task, indices=())
        classes.append(head(module.predict_tokens(inputs)).argmax(dim=1))
    return torch.stack(classes, dim=1)
