"""Training on top of a run: any module, with the engine, checkpoints and pipelines of pretraining.

A task makes a `Job` of each network it wants trained; `tune` trains it, or resumes it, or finds it finished.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from iwm_fast.config.finetuning import TuneTask
from iwm_fast.config.run import OptimConfig, OutputConfig, RunConfig, split_batch
from iwm_fast.evals.finetuning.task import FinetuneTask, Job
from iwm_fast.models.student import compute_dtype
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.runtime.sharding import drop_padding, gather_in_order, local_share
from iwm_fast.training.loaders import evaluation_loader
from iwm_fast.training.train_state import TrainStats
from iwm_fast.training.trainer import Trainer


def tune(
    job: Job,
    task: TuneTask,
    *,
    model_config: RunConfig,
    shards: ShardSet,
    rank_info: RankInfo,
    folder: Path,
    preemption: Preemption | None = None,
) -> TrainStats:
    """Train a job's module in place, in `folder`/`job.name`: from its newest checkpoint, if there is one; collective.

    A finished job is not trained again: its weights are read. Afterwards the module is in evaluation mode.

    Args:
        job: what to train; its module is on any device.
        task: settings.
        model_config: the run's settings, of which views and patch size count.
        shards: training samples.
        rank_info: this process.
        folder: of the task; see `task_folder`.
        preemption: whether to stop early; None: never.

    Raises:
        PreemptedError: on every rank, if one was told to stop.
        CheckpointError: if the folder holds a job of other settings, naming them, or no checkpoint is complete.
        FloatingPointError: if too many steps in a row were not finite.
        ValueError: if batch, ranks and micro-batch do not divide, or another process holds the folder.
    """
    micro_batches(task, rank_info.world_size)
    config = run_config(task, model_config, folder / job.name)
    finetuning = FinetuneTask(job, task, config, shards=shards, rank_info=rank_info)
    state = Trainer(finetuning, preemption=preemption).run()
    finetuning.release()
    num_tuned = sum(parameter.numel() for parameter in job.module.parameters() if parameter.requires_grad)
    return state.stats(num_tuned, config.optim.global_batch_size)


def task_folder(run: str | Path, task: str, name: str = "") -> Path:
    """Return where a task keeps its jobs: <run>/evaluations/<task>, with _<name> if there is a name."""
    return Path(run) / "evaluations" / (f"{task}_{name}" if name else task)


def run_config(task: TuneTask, model_config: RunConfig, folder: Path) -> RunConfig:
    """Return the settings that engine, loader and checkpoints take: the run's networks, the task's training."""
    tune, augment = task.tune, task.augment
    return RunConfig(
        seed=task.seed,
        resume="auto",
        data=replace(model_config.data, train=task.data.train or model_config.data.train, val=task.data.val),
        views=replace(model_config.views, crop_scale=augment.crop_scale, flip_probability=augment.flip),
        mask=model_config.mask,
        model=model_config.model,
        objective=model_config.objective,
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
    model_config: RunConfig,
    shards: ShardSet,
    samples: Int64[np.ndarray, "samples"],
    rank_info: RankInfo,
) -> Shaped[Tensor, "samples *rest"]:
    """Return what `call` says of clean views of the given samples, in their order, on the CPU; collective.

    Each rank computes its share, all return the whole.

    Args:
        call: from a micro-batch to one row for each image; run without gradient in the settings' precision. Networks
            must be in evaluation mode, as `tune` leaves them.
        model_config: size of views, loader and precision; `run_config` of the task gives all of them.
        shards: where the samples are.
        samples: their numbers.
        rank_info: this process.
    """
    share = local_share(samples, rank_info)
    own = drop_padding(share)
    # a rank without samples has to know what a row looks like
    asked = own if len(own) else samples[:1]
    loader = evaluation_loader(model_config, shards, asked, rank_info.device)
    dtype, rows = compute_dtype(model_config), []
    try:
        for batch in loader:
            with torch.autocast(rank_info.device.type, dtype=dtype, enabled=dtype is not None):
                row = call(batch)
            rows.append(row.float() if row.is_floating_point() else row)
    finally:
        loader.close()
    return gather_in_order(share, torch.cat(rows)[: len(own)], rank_info).cpu()
