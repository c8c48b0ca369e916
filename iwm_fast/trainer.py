"""What a run consists of, built once for each rank."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwm_fast import distributed
from iwm_fast.config import RunConfig, accumulation_steps
from iwm_fast.data import open_training_shards
from iwm_fast.distributed import Place
from iwm_fast.engine import Engine, build_engine
from iwm_fast.init_from import initialize_from
from iwm_fast.models.layers import compile_blocks
from iwm_fast.models.student import build_student, choose_ops, compute_dtype
from iwm_fast.objective import Objective
from iwm_fast.optim import build_optimizer
from iwm_fast.settings import fingerprint
from iwm_fast.teacher import Teacher
from pipelines.shards import ShardSet


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """All that a run consists of."""

    config: RunConfig
    place: Place
    shards: ShardSet
    fingerprint: dict[str, Any]
    engine: Engine
    teacher: Teacher
    objective: Objective
    folder: Path


def build_trainer(config: RunConfig, place: Place) -> Trainer:
    """Build networks, optimiser, engine and teacher for this rank.

    Raises:
        ValueError, FileNotFoundError, ShardError: for settings or shards that cannot make a run.
    """
    accumulation_steps(config, place.world_size)
    # indexed once, not by every rank
    shards = distributed.on_rank_zero(lambda: open_training_shards(config.data))
    student = build_student(config, choose_ops(config, place.device)).to(place.device)
    # before the teacher, which begins as a copy
    initialize_from(config, student)
    teacher = Teacher(student.encoder, compute_dtype(config))
    if config.runtime.compile:
        compile_blocks(student)
        compile_blocks(teacher.encoder)
    engine = build_engine(config, student, build_optimizer(student, config.optim), place)
    distributed.limit_waiting(config.runtime.rank_timeout_s)
    return Trainer(
        config=config,
        place=place,
        shards=shards,
        fingerprint=fingerprint(config, shards.content_digest),
        engine=engine,
        teacher=teacher,
        objective=Objective(config.objective, is_identity=config.model.predictor.depth == 0),
        folder=Path(config.output.folder),
    )
