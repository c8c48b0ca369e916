"""Train one run: `python -m iwm_fast.train RUN.yaml key=value ...`, alone, under torchrun or the DeepSpeed launcher."""

import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwm_fast import checkpoint as checkpoints
from iwm_fast import distributed
from iwm_fast.config import RunConfig, accumulation_steps
from iwm_fast.data import log_head, training_loader
from iwm_fast.distributed import Place
from iwm_fast.engine import Engine, build_engine
from iwm_fast.logbook import LogWindow, Progress, say
from iwm_fast.messages import end_process, errors_as_messages, found_by_every_rank
from iwm_fast.metrics import MetricWriter, describe_run
from iwm_fast.models.student import build_student, choose_ops, compute_dtype
from iwm_fast.objective import Objective
from iwm_fast.optim import build_optimizer
from iwm_fast.resume import resume
from iwm_fast.schedules import build_schedules
from iwm_fast.settings import fingerprint, load_config, save_config
from iwm_fast.step import StepReport, train_step
from iwm_fast.teacher import Teacher
from pipelines.action_log import ActionLog
from pipelines.action_parts import remove_from
from pipelines.shards import ShardSet, open_shards

log = logging.getLogger("iwm_fast")

# a broken run would otherwise go on for days without changing a weight
MAX_SKIPPED_IN_A_ROW = 10


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """All that a run consists of, built once."""

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
    if not config.data.train:
        raise ValueError(
            "data.train must name the training shards, got ''; for example data.train='shards/{000..099}.tar'"
        )
    accumulation_steps(config, place.world_size)
    # indexed once, not by every rank
    shards = distributed.on_rank_zero(lambda: open_shards(config.data.train))
    student = build_student(config, choose_ops(config, place.device)).to(place.device)
    teacher = Teacher(student.encoder, compute_dtype(config))
    engine = build_engine(config, student, build_optimizer(student, config.optim), place)
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


def train(trainer: Trainer) -> Progress:
    """Run from the newest checkpoint, or the start, to the last step."""
    config, place = trainer.config, trainer.place
    num_samples = trainer.shards.num_samples
    progress = resume(config, trainer.fingerprint, num_samples, engine=trainer.engine, teacher=trainer.teacher)
    schedules = build_schedules(config.optim, num_samples, progress.start)
    total_steps = schedules.total_steps
    if progress.step >= total_steps:
        log.info("%s is finished: %d steps", trainer.folder, total_steps)
        return progress
    writer = open_folder(trainer, progress) if place.rank == 0 else None
    _, accumulation = accumulation_steps(config, place.world_size)
    actions = open_action_log(trainer, progress)
    loader = training_loader(config, trainer.shards, place, progress.step, progress.start)
    batches = map(actions.add, loader) if actions else loader
    window = LogWindow(schedules, config.optim.global_batch_size, place.device)
    skipped_in_a_row = 0
    try:
        while progress.step < total_steps:
            report = train_step(
                trainer.engine, trainer.teacher, trainer.objective, batches, schedules,
                applied_steps=progress.applied_steps, accumulation=accumulation,
            )  # fmt: skip
            progress.step += 1
            progress.applied_steps += report.is_applied
            skipped_in_a_row = 0 if report.is_applied else skipped_in_a_row + 1
            check_skips(skipped_in_a_row, progress.step, place.rank, report)
            window.add(report)
            is_last = progress.step == total_steps
            if progress.step % config.output.log_every == 0 or is_last:
                values = window.close(report, progress)
                if writer:
                    writer.write(progress.step, values)
                    say(progress.step, total_steps, values)
            if progress.step % config.output.checkpoint_every == 0 or is_last:
                save(trainer, progress, actions)
    finally:
        loader.close()
        if actions:
            actions.close()
        if writer:
            writer.close()
    return progress


def save(trainer: Trainer, progress: Progress, actions: ActionLog | None) -> None:
    """Write a checkpoint, never one that the action log does not reach; every rank takes part."""
    if actions:
        close_part(actions, trainer.place)
    checkpoints.write(
        trainer.folder,
        engine_state=trainer.engine.state(),
        teacher_state=trainer.teacher.state_dict(),
        step=progress.step,
        applied_steps=progress.applied_steps,
        fingerprint=trainer.fingerprint,
        place=trainer.place,
        counters={"stream": dataclasses.asdict(progress.start), "num_samples": trainer.shards.num_samples},
    )


def open_action_log(trainer: Trainer, progress: Progress) -> ActionLog | None:
    """Drop what a log holds from here on, and open it if one is asked for; every rank takes part."""
    config, folder = trainer.config, trainer.folder / "actions"
    distributed.on_rank_zero(lambda: remove_from(folder, progress.step))
    if not config.output.action_log:
        return None
    head = log_head(config, trainer.shards)
    return ActionLog(folder, head=head, shards=trainer.shards, rank=trainer.place.rank)


def close_part(actions: ActionLog, place: Place) -> None:
    """Publish every rank's rows, or end the run on every rank."""
    failure = None
    try:
        actions.close_part()
    # whatever it was, the other ranks must hear of it
    except Exception as error:
        failure = error
    if distributed.agree(failure is not None, place.device):
        # the message is that rank's to give
        raise failure or SystemExit(2)


def open_folder(trainer: Trainer, progress: Progress) -> MetricWriter:
    """Write what the run is made of and open its metrics; on rank 0."""
    trainer.folder.mkdir(parents=True, exist_ok=True)
    save_config(trainer.config, trainer.folder / "config.yaml")
    described = describe_run(trainer.place.device, trainer.place.world_size)
    with (trainer.folder / "started.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": progress.step, **described}) + "\n")
    return MetricWriter(trainer.folder, progress.step)


def check_skips(skipped_in_a_row: int, step: int, rank: int, report: StepReport) -> None:
    """Warn of a skipped step, end the run after too many in a row.

    Raises:
        FloatingPointError: with step, rank and sample keys.
    """
    if skipped_in_a_row == 0:
        return
    log.warning("step %d skipped: gradient norm %s", step, report.grad_norm)
    if skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise FloatingPointError(
            f"{skipped_in_a_row} steps in a row were not finite, last step {step} on rank {rank} with samples "
            f"{', '.join(report.keys[:8])}; lower optim.lr or look at these samples"
        )


def run(config: RunConfig) -> Progress:
    """Start the process group, train, stop."""
    place = distributed.start(config.runtime.device)
    level = logging.INFO if place.rank == 0 else logging.WARNING
    logging.basicConfig(level=level, format=f"[rank {place.rank}] %(message)s" if place.rank else "%(message)s")
    try:
        with found_by_every_rank():
            trainer = build_trainer(config, place)
        return train(trainer)
    finally:
        distributed.stop()


def main(arguments: Sequence[str] | None = None) -> None:
    """Train as the arguments say: RUN.yaml key=value ...; launchers may add --local_rank."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    given = [argument for argument in given if not argument.startswith("--local_rank")]
    with errors_as_messages():
        with found_by_every_rank():
            if not given:
                raise ValueError("which run? give the path of its YAML file, then settings as key=value")
            config = load_config(given[0], given[1:])
        run(config)
    if arguments is None:
        end_process()


if __name__ == "__main__":
    main()
