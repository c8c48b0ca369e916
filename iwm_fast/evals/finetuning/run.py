"""Training on top of a run: any module, with the engine, checkpoints and pipelines of pretraining.

A task makes a `Job` of each network it wants trained; `tune` trains it, or resumes it, or finds it finished.
"""

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from iwm_fast.config.finetuning import TuneTask
from iwm_fast.config.run import OptimConfig, OutputConfig, RunConfig, split_batch
from iwm_fast.evals.datasets import training_shards, validation_shards
from iwm_fast.evals.finetuning.task import FinetuneTask, Job
from iwm_fast.evals.results import Result, Row, name_with_step
from iwm_fast.models.student import compute_dtype
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.runtime.sharding import drop_padding, gather_in_order, local_share
from iwm_fast.training.loaders import evaluation_loader
from iwm_fast.training.train_state import TrainStats
from iwm_fast.training.trainer import Trainer
from iwm_fast.world_model import WorldModel


@dataclass(frozen=True, kw_only=True)
class FinetuneContext:
    """What all networks of one task are trained and measured with."""

    task: TuneTask
    """Its settings."""
    model_config: RunConfig
    """Settings of the run, of which networks, views and loader count."""
    step: int
    """Optimiser steps of the run's checkpoint."""
    train: ShardSet
    val: ShardSet
    folder: Path
    """Holds a folder for each job, and is called like the task's result; see `task_folder`."""
    rank_info: RankInfo
    preemption: Preemption | None = None
    """Whether to stop early; None: never."""

    @property
    def config(self) -> RunConfig:
        """Settings that engine and loader take; see `run_config`."""
        return run_config(self.task, self.model_config, self.folder)

    def result(self, task: str, rows: list[Row], details: dict[str, Any]) -> Result:
        """Return the outcome of a task."""
        return Result(
            task=task,
            name=self.folder.name,
            rows=tuple(rows),
            step=self.step,
            seed=self.task.seed,
            settings=asdict(self.task),
            details=details,
        )


def open_context(
    name: str, task: TuneTask, model: WorldModel, rank_info: RankInfo, preemption: Preemption | None
) -> FinetuneContext:
    """Open the shards of a task on top of a run; `name` is the task's.

    Raises:
        ValueError, FileNotFoundError, ShardError: if there are no such shards, or some cannot be used.
    """
    folder = task_folder(task.run, name, task.name)
    return FinetuneContext(
        task=task,
        model_config=model.config,
        step=model.step,
        train=training_shards(model, task.data),
        val=validation_shards(model, task.data),
        folder=folder.with_name(name_with_step(folder.name, task.checkpoint, model.step)),
        rank_info=rank_info,
        preemption=preemption,
    )


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What a network has come to."""

    measured: Shaped[np.ndarray, "images *rest"]
    """Of each validation image: whether it is named rightly, or its numbers of pixels."""
    tuned: TrainStats


def tune(job: Job, context: FinetuneContext) -> TrainStats:
    """Train a job's module in place, in a folder of its name: from its newest checkpoint, if there is one; collective.

    A finished job is not trained again: its weights are read. Afterwards the module is in evaluation mode.

    Raises:
        PreemptedError: on every rank, if one was told to stop.
        CheckpointError: if the folder holds a job of other settings, naming them, or no checkpoint is complete.
        FloatingPointError: if too many steps in a row were not finite.
        ValueError: if batch, ranks and micro-batch do not divide, or another process holds the folder.
    """
    task, rank_info = context.task, context.rank_info
    micro_batches(task, rank_info.world_size)
    config = run_config(task, context.model_config, context.folder / job.name)
    finetuning = FinetuneTask(job, task, config, shards=context.train, rank_info=rank_info)
    state = Trainer(finetuning, preemption=context.preemption).run()
    finetuning.release()
    num_tuned = sum(parameter.numel() for parameter in job.module.parameters() if parameter.requires_grad)
    return state.stats(num_tuned, config.optim.global_batch_size)


def free_memory(device: torch.device) -> None:
    """Give back what networks have left that are not needed any more."""
    # engines hold on to themselves in circles, and on to memory
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def task_folder(run: str | Path, task: str, name: str = "") -> Path:
    """Return where a task keeps its jobs: <run>/evaluations/<task>, with _<name> if there is a name."""
    return Path(run) / "evaluations" / (f"{task}_{name}" if name else task)


def run_config(task: TuneTask, model_config: RunConfig, folder: Path) -> RunConfig:
    """Return the settings that engine, loader and checkpoints take: the run's networks, the task's training."""
    tune, augment = task.tune, task.augment
    return replace(
        model_config,
        seed=task.seed,
        resume="auto",
        init_from="",
        data=replace(model_config.data, train=task.data.train or model_config.data.train, val=task.data.val),
        views=replace(model_config.views, crop_scale=augment.crop_scale, flip_probability=augment.flip),
        optim=OptimConfig(
            global_batch_size=tune.global_batch_size,
            epochs=tune.epochs,
            warmup_epochs=tune.warmup_epochs,
            lr=tune.lr,
            lr_start=0.0,
            lr_end=0.0,
            weight_decay=(tune.weight_decay, tune.weight_decay),
            schedule_stretch=1.0,
            betas=tune.betas,
            clip_norm=tune.clip_norm,
            precision=tune.precision,
        ),
        runtime=task.runtime,
        output=OutputConfig(
            folder=str(folder), log_every=task.log_every, checkpoint_every=task.checkpoint_every, keep_last=2
        ),
    )


def micro_batches(task: TuneTask, world_size: int) -> tuple[int, int]:
    """Return images per rank and forward, and forwards per optimiser step.

    Raises:
        ValueError: if batch, ranks and micro-batch do not divide.
    """
    return split_batch("tune", task.tune.global_batch_size, task.runtime.micro_batch_size, world_size)


@torch.no_grad()
def predict(
    call: Callable[[Batch], Shaped[Tensor, "B *rest"]],
    context: FinetuneContext,
    samples: Int64[np.ndarray, "samples"] | None = None,
) -> Shaped[Tensor, "samples *rest"]:
    """Return what `call` says of clean validation views, in the order of the samples, on the CPU; collective.

    Each rank computes its share, all return the whole.

    Args:
        call: from a micro-batch to one row for each image; run without gradient in the settings' precision. Networks
            must be in evaluation mode, as `tune` leaves them.
        context: gives shards, loader and precision.
        samples: numbers of the validation images; None: all.
    """
    config, device = context.config, context.rank_info.device
    share = local_share(np.arange(context.val.num_samples) if samples is None else samples, context.rank_info)
    local = drop_padding(share)
    # a rank without samples has to know what a row looks like
    loader = evaluation_loader(config, context.val, local if len(local) else np.zeros(1, np.int64), device)
    dtype, rows = compute_dtype(config), []
    try:
        for batch in loader:
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                row = call(batch)
            rows.append(row.float() if row.is_floating_point() else row)
    finally:
        loader.close()
    return gather_in_order(share, torch.cat(rows)[: len(local)], context.rank_info).cpu()
