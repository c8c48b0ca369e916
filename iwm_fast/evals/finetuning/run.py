"""Training and evaluation of modules on top of a run, with the engines, checkpoints and pipelines of pretraining.

An evaluation builds a `Job` for each network that it trains. `train_job` trains it, resumes it, or reads its weights if
it is finished; `map_validation_images` evaluates it on the validation images.
"""

import gc
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from iwm_fast.config.batch_size import describe_large_batch, split_batch
from iwm_fast.config.finetuning import TrainedSettings
from iwm_fast.config.run import OutputConfig, RunConfig
from iwm_fast.evals.datasets import training_shards, validation_shards
from iwm_fast.evals.finetuning.task import FinetuneTask, Job
from iwm_fast.evals.results import Result, Row, name_with_choices
from iwm_fast.models.student import compute_dtype
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.runtime.rank_agreement import require_same_on_all_ranks
from iwm_fast.runtime.sharding import drop_padding, gather_in_order, local_share
from iwm_fast.training.loaders import evaluation_loader
from iwm_fast.training.train_state import TrainStats
from iwm_fast.training.trainer import Trainer
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)


# The settings of one evaluation.
Settings = TypeVar("Settings", bound=TrainedSettings)


@dataclass(frozen=True, kw_only=True)
class FinetuneContext(Generic[Settings]):
    """Settings, data and process that all networks of one evaluation are trained and measured with."""

    settings: Settings
    """Settings of the evaluation."""
    model_config: RunConfig
    """Settings of the run; networks, views and loader are configured by them."""
    step: int
    """Number of optimiser steps of the run's checkpoint."""
    train: ShardSet
    val: ShardSet
    folder: Path
    """Folder that holds one folder for each job; its name is the name of the result."""
    rank_info: RankInfo
    preemption: Preemption | None = None
    """Source of requests to stop early; None: training never stops early."""

    @property
    def run_config(self) -> RunConfig:
        """Settings in the form that engines and loaders accept."""
        return build_run_config(self.settings, self.model_config, self.folder, self.train.num_samples)

    def make_result(self, task: str, rows: list[Row], details: dict[str, Any]) -> Result:
        """Return the result of the evaluation with this name."""
        return Result(
            task=task,
            name=self.folder.name,
            rows=tuple(rows),
            step=self.step,
            seed=self.settings.seed,
            settings=asdict(self.settings),
            details=details,
        )


def open_context(
    name: str, settings: Settings, model: WorldModel, rank_info: RankInfo, preemption: Preemption | None
) -> FinetuneContext[Settings]:
    """Open the shards for an evaluation of a run; `name` is the name of the evaluation.

    Raises:
        ValueError, FileNotFoundError, ShardError: if shards are not named, do not exist or cannot be used.
    """
    folder = task_folder(settings.run, name, settings.name)
    return FinetuneContext(
        settings=settings,
        model_config=model.config,
        step=model.step,
        train=training_shards(model, settings.data),
        val=validation_shards(model, settings.data),
        folder=folder.with_name(name_with_choices(folder.name, settings, model.step)),
        rank_info=rank_info,
        preemption=preemption,
    )


@dataclass(frozen=True, kw_only=True)
class TrainedVariant:
    """Measurements on a trained network and the cost of its training."""

    per_image: Shaped[np.ndarray, "images *rest"]
    """One entry for each validation image: whether its class was predicted correctly, or its pixel counts."""
    stats: TrainStats
    """Number of trained parameters, speed and duration."""


def train_job(job: Job, context: FinetuneContext) -> TrainStats:
    """Train a job's module in place, starting from the newest checkpoint in the job's folder if there is one.

    A finished job is not trained again; its weights are read. Afterwards the module is in evaluation mode. Collective:
    every rank must call it.

    Raises:
        PreemptedError: on every rank, if one was asked to stop.
        CheckpointError: if the folder holds a job with other settings, which are listed, or no complete checkpoint.
        FloatingPointError: if the loss or gradient was not finite in too many steps in a row.
        ValueError: if batch, ranks and micro-batch do not divide, or another process uses the folder.
    """
    settings, rank_info = context.settings, context.rank_info
    # Sizes that do not divide are refused here, before the engine and the loader are built.
    split_global_batch(settings, rank_info.world_size)
    config = build_run_config(settings, context.model_config, context.folder / job.name, context.train.num_samples)
    warning = describe_large_batch("tune", settings.tune.global_batch_size, context.train.num_samples)
    if warning and rank_info.rank == 0:
        log.warning("%s", warning)
    finetuning = FinetuneTask(job, settings, config, shards=context.train, rank_info=rank_info)
    require_same_on_all_ranks({**finetuning.fingerprint, "data.val": context.val.content_digest})
    state = Trainer(finetuning, preemption=context.preemption).run()
    finetuning.release()
    num_tuned = sum(parameter.numel() for parameter in job.module.parameters() if parameter.requires_grad)
    return state.stats(num_tuned, config.optim.global_batch_size)


def free_memory(device: torch.device) -> None:
    """Free the memory of networks that are no longer used, before the next ones are built."""
    # Engines contain reference cycles, so they and their tensors are freed only by the garbage collector.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def task_folder(run: str | Path, task: str, name: str = "") -> Path:
    """Return the folder for the jobs of an evaluation: <run>/evaluations/<task>, or <task>_<name> if it has a name."""
    return Path(run) / "evaluations" / (f"{task}_{name}" if name else task)


def build_run_config(settings: TrainedSettings, model_config: RunConfig, folder: Path, num_samples: int) -> RunConfig:
    """Return a run configuration with the networks of `model_config` and the training of `settings`.

    `num_samples` is the number of training samples.
    """
    optim = replace(settings.optim(num_samples), precision=settings.tune.precision or model_config.optim.precision)
    return replace(
        model_config,
        seed=settings.seed,
        resume="auto",
        init_from="",
        # Without the weights of a mixture: every sample is seen once per epoch.
        data=replace(
            model_config.data,
            train=settings.data.train or model_config.data.train,
            mixture=(),
            val=settings.data.val,
        ),
        views=settings.training_views(model_config.views),
        optim=optim,
        runtime=settings.runtime,
        # Two checkpoints, because the newest one may be damaged.
        output=OutputConfig(
            folder=str(folder), log_every=settings.log_every, checkpoint_every=settings.checkpoint_every, keep_last=2
        ),
    )


def split_global_batch(settings: TrainedSettings, world_size: int) -> tuple[int, int]:
    """Return the micro-batch size (images per rank and forward) and the number of micro-batches per optimiser step.

    Raises:
        ValueError: if batch, ranks and micro-batch do not divide.
    """
    return split_batch("tune", settings.tune.global_batch_size, settings.runtime.micro_batch_size, world_size)


@torch.no_grad()
def map_validation_images(
    forward: Callable[[Batch], Shaped[Tensor, "B *rest"]],
    context: FinetuneContext,
    samples: Int64[np.ndarray, "samples"] | None = None,
) -> Shaped[Tensor, "samples *rest"]:
    """Return the outputs of `forward` for validation images without augmentation, on the CPU, in the samples' order.

    Each rank computes its share, and all ranks return all outputs. Collective: every rank must call it.

    Args:
        forward: maps a micro-batch to one output for each image. It runs without gradient, in the precision of the
            settings. Networks must be in evaluation mode, in which `train_job` leaves them.
        context: provides shards, loader and precision.
        samples: numbers of the validation images; None: all.
    """
    config, device = context.run_config, context.rank_info.device
    share = local_share(np.arange(context.val.num_samples) if samples is None else samples, context.rank_info)
    local = drop_padding(share)
    # A rank without samples computes sample 0, because gathering needs the outputs' shape and dtype on every rank.
    loader = evaluation_loader(config, context.val, local if len(local) else np.zeros(1, np.int64), device)
    dtype, outputs = compute_dtype(config), []
    try:
        for batch in loader:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                output = forward(batch)
            outputs.append(output.float() if output.is_floating_point() else output)
    finally:
        loader.close()
    return gather_in_order(share, torch.cat(outputs)[: len(local)], context.rank_info).cpu()
