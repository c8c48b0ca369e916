"""The objects that a training run consists of, built once on each rank."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwm_fast.checkpoints.pretrained import initialize_from
from iwm_fast.config.fingerprint import fingerprint
from iwm_fast.config.run import RunConfig, accumulation_steps
from iwm_fast.engines.base import Engine
from iwm_fast.engines.factory import build_engine
from iwm_fast.engines.optimizer import build_optimizer
from iwm_fast.kernels.ops import FUSED
from iwm_fast.models.kernel_check import check_kernels
from iwm_fast.models.layers import compile_blocks
from iwm_fast.models.student import build_student, choose_ops, compute_dtype
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.loaders import open_training_shards
from iwm_fast.training.objective import Objective
from iwm_fast.training.teacher import Teacher


@dataclass(frozen=True, kw_only=True)
class TrainingComponents:
    """The objects that a training run consists of, on one rank."""

    config: RunConfig
    rank_info: RankInfo
    shards: ShardSet
    """Training samples."""
    fingerprint: dict[str, Any]
    """Settings that determine the result, see `iwm_fast.config.fingerprint`."""
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
    """
    # Called for its checks, so that an unusable batch size fails before shards are indexed.
    accumulation_steps(config, rank_info.world_size)
    # Only rank 0 indexes the shards: many ranks would read the same headers from shared storage.
    shards = distributed.broadcast_from_rank_zero(lambda: open_training_shards(config.data))
    ops = choose_ops(config, rank_info.device)
    if ops is FUSED and config.runtime.check_kernels and rank_info.device.type == "cuda":
        check_kernels(config, rank_info.device)
    student = build_student(config, ops).to(rank_info.device)
    # The teacher starts as a copy of the encoder, so the initial weights must be loaded before it is made.
    initialize_from(config, student)
    teacher = Teacher(student.encoder, compute_dtype(config))
    # Compiled in place, before the engine wraps the modules.
    if config.runtime.compile:
        compile_blocks(student)
        compile_blocks(teacher.encoder)
    engine = build_engine(config, student, build_optimizer(student, config.optim), rank_info)
    # DeepSpeed has created process groups of its own, with its default timeout.
    distributed.set_collective_timeout(config.runtime.rank_timeout_s)
    return TrainingComponents(
        config=config,
        rank_info=rank_info,
        shards=shards,
        fingerprint=fingerprint(config, shards.content_digest),
        engine=engine,
        teacher=teacher,
        objective=Objective(config.objective, is_identity=config.model.predictor.depth == 0),
        folder=Path(config.output.folder),
    )
