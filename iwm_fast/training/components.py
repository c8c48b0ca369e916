"""What a run consists of, built once for each rank."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwm_fast.checkpoints.pretrained import initialize_from
from iwm_fast.config.fingerprint import fingerprint
from iwm_fast.config.run import RunConfig, accumulation_steps
from iwm_fast.engines.base import Engine
from iwm_fast.engines.factory import build_engine
from iwm_fast.engines.optimizer import build_optimizer
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
    """All that a run consists of."""

    config: RunConfig
    rank_info: RankInfo
    shards: ShardSet
    fingerprint: dict[str, Any]
    engine: Engine
    teacher: Teacher
    objective: Objective
    folder: Path


def build_components(config: RunConfig, rank_info: RankInfo) -> TrainingComponents:
    """Build networks, optimiser, engine and teacher for this rank.

    Raises:
        ValueError, FileNotFoundError, ShardError: for settings or shards that cannot make a run.
    """
    accumulation_steps(config, rank_info.world_size)
    # indexed once, not by every rank
    shards = distributed.broadcast_from_rank_zero(lambda: open_training_shards(config.data))
    student = build_student(config, choose_ops(config, rank_info.device)).to(rank_info.device)
    # before the teacher, which begins as a copy
    initialize_from(config, student)
    teacher = Teacher(student.encoder, compute_dtype(config))
    if config.runtime.compile:
        compile_blocks(student)
        compile_blocks(teacher.encoder)
    engine = build_engine(config, student, build_optimizer(student, config.optim), rank_info)
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
