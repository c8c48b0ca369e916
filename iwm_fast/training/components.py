"""The objects that a training run consists of, built once on each rank."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iwm_fast.checkpoints.pretrained import initialize_from
from iwm_fast.config.batch_size import accumulation_steps, describe_large_batch
from iwm_fast.config.fingerprint import fingerprint
from iwm_fast.config.run import RunConfig
from iwm_fast.engines.base import Engine
from iwm_fast.engines.factory import build_engine
from iwm_fast.engines.optimizer import build_optimizer
from iwm_fast.kernels.ops import FUSED
from iwm_fast.models.kernel_check import check_kernels
from iwm_fast.models.layers import compile_blocks
from iwm_fast.models.student import build_student, choose_ops, compute_dtype
from iwm_fast.monitoring.out_of_memory import memory_errors_explained
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.rank_agreement import require_same_on_all_ranks
from iwm_fast.training.loaders import open_training_shards_on_all_ranks
from iwm_fast.training.objective import Objective
from iwm_fast.training.teacher import Teacher

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingComponents:
    """The objects that a training run consists of, on one rank."""

    config: RunConfig
    rank_info: RankInfo
    shards: ShardSet
    """Training samples."""
    fingerprint: dict[str, Any]
    """Settings that determine the result, see `iwm_fast.config.fingerprint`, with the paths of rank 0."""
    engine: Engine
    """Encoder and predictor with their optimiser."""
    teacher: Teacher
    objective: Objective
    folder: Path
    """Run folder."""


def build_components(config: RunConfig, rank_info: RankInfo) -> TrainingComponents:
    """Build networks, optimiser, engine and teacher for this rank.

    Collective: every rank must call it.

    Raises:
        ValueError, FileNotFoundError, ShardError: if the settings or the shards cannot be used.
        TrainingMemoryError: if the networks do not fit into memory.
    """
    with memory_errors_explained(config, rank_info, lambda: "the construction of the networks"):
        return _build_components(config, rank_info)


def _build_components(config: RunConfig, rank_info: RankInfo) -> TrainingComponents:
    # First, so that an unusable batch size fails before shards are indexed.
    micro_batch_size, _ = accumulation_steps(config, rank_info.world_size)
    images_per_forward = micro_batch_size * rank_info.world_size
    shards = open_training_shards_on_all_ranks(config.data, rank_info)
    warning = describe_large_batch("optim", config.optim.global_batch_size, shards.num_samples)
    if warning and rank_info.rank == 0:
        log.warning("%s", warning)
    ops = choose_ops(config, rank_info.device)
    if ops is FUSED and config.runtime.check_kernels and rank_info.device.type == "cuda":
        check_kernels(config, rank_info.device)
    student = build_student(config, ops).to(rank_info.device)
    # The teacher starts as a copy of the encoder, so the initial weights must be loaded before it is made.
    initialize_from(config, student)
    # init_from may lead to other weights on another machine. Engines would copy rank 0's, but not to the teacher.
    require_same_on_all_ranks({"size of the initial weights (init_from, seed)": _describe_weights(student)})
    teacher = Teacher(student.encoder, compute_dtype(config))
    # Compiled in place, before the engine wraps the modules.
    if config.runtime.compile:
        compile_blocks(student)
        compile_blocks(teacher.encoder)
    engine = build_engine(config, student, build_optimizer(student, config.optim), rank_info)
    # DeepSpeed has created process groups of its own, with its default timeout.
    distributed.set_collective_timeout(config.runtime.rank_timeout_s)
    # Rank 0's for all, because each rank compares it with that of the checkpoint, and init_from may be another path on
    # another machine.
    settings = distributed.broadcast_from_rank_zero(
        lambda: fingerprint(config, shards.sources_digest, images_per_forward=images_per_forward)
    )
    return TrainingComponents(
        config=config,
        rank_info=rank_info,
        shards=shards,
        fingerprint=settings,
        engine=engine,
        teacher=teacher,
        objective=Objective(config.objective, is_identity=config.model.predictor.depth == 0),
        folder=Path(config.output.folder),
    )


def _describe_weights(module: nn.Module) -> str:
    """Return the sums of all weights and of their squares, which differ for weights of another file."""
    sums = [torch.stack([weight.double().sum(), weight.double().square().sum()]) for weight in module.parameters()]
    # Rounded, because other GPUs add in another order.
    return "{:.9g}, {:.9g}".format(*torch.stack(sums).sum(dim=0).tolist())
