"""The loop over steps: one start of a run, from where it stands to its end or until it is told to stop."""

import dataclasses
import json
import logging
import os
import time

from iwm_fast import distributed
from iwm_fast.checkpoint_writer import CheckpointWriter
from iwm_fast.config import RunConfig, accumulation_steps
from iwm_fast.data import log_head, training_loader
from iwm_fast.distributed import Place
from iwm_fast.folder_lock import FolderLock
from iwm_fast.logbook import LogWindow, Progress
from iwm_fast.messages import found_by_every_rank, lost_rank
from iwm_fast.metrics import MetricWriter, describe_run
from iwm_fast.online import OnlineEvaluation
from iwm_fast.preemption import PreemptedError, Preemption, read_status, write_status
from iwm_fast.profiler import StepProfiler
from iwm_fast.resume import resume
from iwm_fast.schedules import build_schedules
from iwm_fast.settings import save_config
from iwm_fast.skipped_steps import SkippedSteps
from iwm_fast.speed import build_yardstick
from iwm_fast.step import StepReport, train_step
from iwm_fast.terminal import open_display
from iwm_fast.trainer import Trainer, build_trainer
from pipelines.action_log import ActionLog
from pipelines.action_parts import remove_from

log = logging.getLogger("iwm_fast")


def run(config: RunConfig, preemption: Preemption | None = None) -> Progress:
    """Start the process group, train, stop.

    Raises:
        PreemptedError: on every rank, if one was told to stop.
    """
    rank = os.environ.get("RANK", "0")
    level, mark = (logging.INFO, "") if rank == "0" else (logging.WARNING, f"[rank {rank}] ")
    logging.basicConfig(level=level, format=f"{mark}%(message)s")
    place = distributed.start(config.runtime.device, config.runtime.rank_timeout_s)
    try:
        with found_by_every_rank():
            trainer = build_trainer(config, place)
        return train(trainer, preemption or Preemption())
    finally:
        distributed.stop()


def train(trainer: Trainer, preemption: Preemption | None = None) -> Progress:
    """Run from the newest checkpoint, or the start, to the last step.

    Raises:
        PreemptedError: on every rank, if one was told to stop.
        ValueError: if another run holds the folder.
    """
    locks: list[FolderLock] = []
    distributed.on_rank_zero(lambda: locks.append(FolderLock(trainer.folder)))
    try:
        return _train(trainer, preemption or Preemption())
    finally:
        for lock in locks:
            lock.close()


def _train(trainer: Trainer, preemption: Preemption) -> Progress:
    config = trainer.config
    num_samples = trainer.shards.num_samples
    progress = resume(config, trainer.fingerprint, num_samples, engine=trainer.engine, teacher=trainer.teacher)
    total_steps = build_schedules(config.optim, num_samples, progress.start).total_steps
    if progress.step >= total_steps:
        log.info("%s is finished: %d steps", trainer.folder, total_steps)
        return progress
    loop = Loop(trainer, progress, preemption)
    try:
        loop.go()
    except Exception as error:
        loop.note_failure(error)
        raise
    finally:
        loop.close()
    return progress


class Loop:
    """Makes the steps of a run, and everything that is done between them."""

    def __init__(self, trainer: Trainer, progress: Progress, preemption: Preemption) -> None:
        config, place = trainer.config, trainer.place
        self._trainer, self._progress, self._preemption = trainer, progress, preemption
        self._schedules = build_schedules(config.optim, trainer.shards.num_samples, progress.start)
        self._total_steps = self._schedules.total_steps
        # before anything is written: what is wrong with data.val ends the run here
        began = time.monotonic()
        self._evaluate = OnlineEvaluation(config, trainer.shards, place) if config.output.evaluate_every else None
        preemption.note_step(time.monotonic() - began)
        self._writer = open_folder(trainer, progress) if place.rank == 0 else None
        self._saver = CheckpointWriter(
            config, place, fingerprint=trainer.fingerprint, run_id=progress.run_id, last_step=progress.step
        )
        self._actions = open_action_log(trainer, progress)
        self._loader = training_loader(config, trainer.shards, place, progress.step, progress.start)
        self._batches = map(self._actions.add, self._loader) if self._actions else self._loader
        yardstick = build_yardstick(config, place)
        log.info("%s", yardstick)
        self._window = LogWindow(self._schedules, yardstick, place.device)
        self._skipped = SkippedSteps(trainer.folder, place, config.runtime.max_skipped_steps)
        self._profiler = StepProfiler(config.runtime.profile, trainer.folder / "profile", place)
        self._display = open_display(place, progress.step, self._total_steps)
        self._is_stopping = False
        self._note("running")

    def go(self) -> None:
        """Make steps until the last one is done and its checkpoint is on the disk.

        Raises:
            PreemptedError: on every rank, if one was told to stop.
            FloatingPointError: if too many steps in a row were not finite.
            CheckpointError: on every rank, if a checkpoint could not be written.
        """
        while self._progress.step < self._total_steps:
            began = time.monotonic()
            flags = [bool(self._preemption.reason), self._saver.has_failed]
            must_stop, has_failed = distributed.agree_on_each(flags, self._trainer.place.device)
            if has_failed:
                # says so on every rank
                self._saver.wait()
            if must_stop:
                self._stop()
            self._write_down(self._step())
            self._preemption.note_step(time.monotonic() - began)
        self._note("finished")

    def _step(self) -> StepReport:
        trainer, progress = self._trainer, self._progress
        self._profiler.reach(progress.step)
        report = train_step(
            trainer.engine, trainer.teacher, trainer.objective, self._batches, self._schedules,
            applied_steps=progress.applied_steps,
            accumulation=accumulation_steps(trainer.config, trainer.place.world_size)[1],
        )  # fmt: skip
        progress.step += 1
        progress.applied_steps += report.is_applied
        return report

    def _write_down(self, report: StepReport) -> None:
        output, step = self._trainer.config.output, self._progress.step
        is_last = step == self._total_steps
        self._window.add(report)
        self._display.advance(step)
        if step % output.log_every == 0 or is_last:
            values = self._window.close(report, self._progress)
            if self._evaluate and output.evaluate_every and (step % output.evaluate_every == 0 or is_last):
                values |= self._evaluate(self._trainer.teacher, self._trainer.engine.named_parameters("predictor."))
            if self._writer:
                self._writer.write(step, values)
                self._display.show(step, values)
        self._skipped.add(step, report)
        if self._skipped.is_hopeless:
            # weights are those of before, and worth to go on from
            self._save(must_be_published=True)
            self._skipped.end_run()
        if step % output.checkpoint_every == 0 or is_last:
            self._save(must_be_published=is_last)

    def _save(self, *, must_be_published: bool) -> None:
        """Begin a checkpoint, never one that the action log does not reach; every rank takes part."""
        trainer, progress = self._trainer, self._progress
        if self._saver.last_step != progress.step:
            # the last state leaves the memory before another is copied
            self._saver.wait()
            if self._actions:
                close_part(self._actions, trainer.place)
            self._saver.write(
                engine_state=trainer.engine.state(),
                teacher_state=trainer.teacher.state_dict(),
                step=progress.step,
                applied_steps=progress.applied_steps,
                counters={"stream": dataclasses.asdict(progress.start), "num_samples": trainer.shards.num_samples},
            )
        if must_be_published:
            self._saver.wait()

    def _stop(self) -> None:
        self._is_stopping = True
        self._preemption.save_in_peace()
        self._save(must_be_published=True)
        reasons = distributed.gather_objects(self._preemption.reason)
        reason = next(reason for reason in reasons if reason)
        self._note("preempted", reason)
        # no rank ends, and lets its launcher end others, before that is written
        distributed.agree(False, self._trainer.place.device)
        raise PreemptedError(reason, self._progress.step)

    def _note(self, state: str, reason: str = "") -> None:
        if self._trainer.place.rank == 0:
            write_status(self._trainer.folder, state, step=self._progress.step, reason=reason)

    def note_failure(self, error: Exception) -> None:
        """Say in the run's folder why it ends, on whichever rank it is."""
        folder, lost = self._trainer.folder, lost_rank(error)
        # the rank that is gone may have said why itself
        if isinstance(error, PreemptedError) or (lost and read_status(folder).get("state") != "running"):
            return
        reason = f"another rank is gone or hangs: {lost}" if lost else f"{type(error).__name__}: {error}"
        if lost and self._is_stopping:
            # all had agreed to stop; whoever told them was tired of waiting, and has killed one
            write_status(folder, "preempted", reason=f"{self._preemption.reason or 'told to stop'}; {reason}")
        else:
            write_status(folder, "failed", step=self._progress.step, reason=reason)

    def close(self) -> None:
        """Finish what is open."""
        self._display.close()
        self._profiler.close(self._progress.step)
        self._loader.close()
        if self._actions:
            self._actions.close()
        if self._writer:
            self._writer.close()
        self._saver.close()


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
        file.write(json.dumps({"step": progress.step, "run_id": progress.run_id, **described}) + "\n")
    return MetricWriter(trainer.folder, progress.step)
