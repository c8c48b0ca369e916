"""The loop over steps: one start of a run, from where it stands to its end or until it is told to stop."""

import dataclasses
import json
import logging
import time
from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from iwm_fast.checkpoints.async_writer import CheckpointWriter
from iwm_fast.config.loading import save_config
from iwm_fast.config.run import accumulation_steps
from iwm_fast.monitoring.metrics import MetricWriter
from iwm_fast.monitoring.profiler import StepProfiler
from iwm_fast.monitoring.progress_bar import open_display
from iwm_fast.monitoring.throughput import build_yardstick
from iwm_fast.pipelines.action_log.files import remove_from
from iwm_fast.pipelines.action_log.writer import ActionLog
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.error_reporting import lost_rank
from iwm_fast.runtime.preemption import PreemptedError, Preemption
from iwm_fast.runtime.provenance import describe_run
from iwm_fast.runtime.run_lock import FolderLock
from iwm_fast.runtime.run_status import read_status, write_status
from iwm_fast.training.components import TrainingComponents
from iwm_fast.training.loaders import log_head, training_loader
from iwm_fast.training.log_window import LogWindow
from iwm_fast.training.nonfinite_guard import SkippedSteps
from iwm_fast.training.resume import resume
from iwm_fast.training.schedules import build_schedules
from iwm_fast.training.step import StepReport, train_step
from iwm_fast.training.teacher import Teacher
from iwm_fast.training.train_state import Progress

log = logging.getLogger("iwm_fast")


@runtime_checkable
class Evaluator(Protocol):
    """Something measured while a run goes on; every rank has one and calls it at the same steps."""

    def prepare(self) -> None:
        """Open and check what will be needed, before the run writes anything; collective."""
        ...

    def __call__(self, teacher: Teacher, parameters: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        """Return values for the log row, from the teacher and the predictor's float32 weights; collective."""
        ...


def train(
    components: TrainingComponents, preemption: Preemption | None = None, evaluators: Sequence[Evaluator] = ()
) -> Progress:
    """Run from the newest checkpoint, or the start, to the last step.

    Args:
        components: what the run consists of.
        preemption: whether to stop early; None: never.
        evaluators: measured every `output.evaluate_every` steps and after the last one.

    Raises:
        PreemptedError: on every rank, if one was told to stop.
        ValueError: if another run holds the folder.
    """
    locks: list[FolderLock] = []
    distributed.on_rank_zero(lambda: locks.append(FolderLock(components.folder)))
    try:
        return _train(components, preemption or Preemption(), evaluators)
    finally:
        for lock in locks:
            lock.close()


def _train(components: TrainingComponents, preemption: Preemption, evaluators: Sequence[Evaluator]) -> Progress:
    config = components.config
    num_samples = components.shards.num_samples
    progress = resume(config, components.fingerprint, num_samples, engine=components.engine, teacher=components.teacher)
    total_steps = build_schedules(config.optim, num_samples, progress.start).total_steps
    if progress.step >= total_steps:
        log.info("%s is finished: %d steps", components.folder, total_steps)
        return progress
    trainer = Trainer(components, progress, preemption, evaluators)
    try:
        trainer.run()
    except Exception as error:
        trainer.note_failure(error)
        raise
    finally:
        trainer.close()
    return progress


class Trainer:
    """Makes the steps of a run, and everything that is done between them."""

    def __init__(
        self,
        components: TrainingComponents,
        progress: Progress,
        preemption: Preemption,
        evaluators: Sequence[Evaluator] = (),
    ) -> None:
        config, rank_info = components.config, components.rank_info
        self._components, self._progress, self._preemption = components, progress, preemption
        self._evaluators = evaluators
        self._schedules = build_schedules(config.optim, components.shards.num_samples, progress.start)
        self._total_steps = self._schedules.total_steps
        # before anything is written: what is wrong with data.val ends the run here
        began = time.monotonic()
        for evaluator in evaluators:
            evaluator.prepare()
        preemption.note_step(time.monotonic() - began)
        self._writer = open_folder(components, progress) if rank_info.rank == 0 else None
        self._saver = CheckpointWriter(
            config, rank_info, fingerprint=components.fingerprint, run_id=progress.run_id, last_step=progress.step
        )
        self._actions = open_action_log(components, progress)
        self._loader = training_loader(config, components.shards, rank_info, progress.step, progress.start)
        self._batches = map(self._actions.add, self._loader) if self._actions else self._loader
        yardstick = build_yardstick(config, rank_info)
        log.info("%s", yardstick)
        self._window = LogWindow(self._schedules, yardstick, rank_info.device)
        self._skipped = SkippedSteps(components.folder, rank_info, config.runtime.max_skipped_steps)
        self._profiler = StepProfiler(config.runtime.profile, components.folder / "profile", rank_info)
        self._display = open_display(rank_info, progress.step, self._total_steps)
        self._is_stopping = False
        self._note("running")

    def run(self) -> None:
        """Make steps until the last one is done and its checkpoint is on the disk.

        Raises:
            PreemptedError: on every rank, if one was told to stop.
            FloatingPointError: if too many steps in a row were not finite.
            CheckpointError: on every rank, if a checkpoint could not be written.
        """
        while self._progress.step < self._total_steps:
            began = time.monotonic()
            flags = [bool(self._preemption.reason), self._saver.has_failed]
            must_stop, has_failed = distributed.agree_on_each(flags, self._components.rank_info.device)
            if has_failed:
                # says so on every rank
                self._saver.wait()
            if must_stop:
                self._stop()
            self._write_down(self._step())
            self._preemption.note_step(time.monotonic() - began)
        self._note("finished")

    def _step(self) -> StepReport:
        components, progress = self._components, self._progress
        self._profiler.reach(progress.step)
        report = train_step(
            components.engine, components.teacher, components.objective, self._batches, self._schedules,
            applied_steps=progress.applied_steps,
            accumulation=accumulation_steps(components.config, components.rank_info.world_size)[1],
        )  # fmt: skip
        progress.step += 1
        progress.applied_steps += report.is_applied
        return report

    def _write_down(self, report: StepReport) -> None:
        output, step = self._components.config.output, self._progress.step
        is_last = step == self._total_steps
        self._window.add(report)
        self._display.advance(step)
        if step % output.log_every == 0 or is_last:
            values = self._window.close(report, self._progress)
            if output.evaluate_every and (step % output.evaluate_every == 0 or is_last):
                values |= self._evaluate()
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

    def _evaluate(self) -> dict[str, float]:
        teacher, engine = self._components.teacher, self._components.engine
        values: dict[str, float] = {}
        for evaluator in self._evaluators:
            values |= evaluator(teacher, engine.named_parameters("predictor."))
        return values

    def _save(self, *, must_be_published: bool) -> None:
        """Begin a checkpoint, never one that the action log does not reach; every rank takes part."""
        components, progress = self._components, self._progress
        if self._saver.last_step != progress.step:
            # the last state leaves the memory before another is copied
            self._saver.wait()
            if self._actions:
                close_part(self._actions, components.rank_info)
            self._saver.write(
                engine_state=components.engine.state(),
                teacher_state=components.teacher.state_dict(),
                step=progress.step,
                applied_steps=progress.applied_steps,
                counters={"stream": dataclasses.asdict(progress.start), "num_samples": components.shards.num_samples},
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
        distributed.agree(False, self._components.rank_info.device)
        raise PreemptedError(reason, self._progress.step)

    def _note(self, state: str, reason: str = "") -> None:
        if self._components.rank_info.rank == 0:
            write_status(self._components.folder, state, step=self._progress.step, reason=reason)

    def note_failure(self, error: Exception) -> None:
        """Say in the run's folder why it ends, on whichever rank it is."""
        folder, lost = self._components.folder, lost_rank(error)
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


def open_action_log(components: TrainingComponents, progress: Progress) -> ActionLog | None:
    """Drop what a log holds from here on, and open it if one is asked for; every rank takes part."""
    config, folder = components.config, components.folder / "actions"
    distributed.on_rank_zero(lambda: remove_from(folder, progress.step))
    if not config.output.action_log:
        return None
    head = log_head(config, components.shards)
    return ActionLog(folder, head=head, shards=components.shards, rank=components.rank_info.rank)


def close_part(actions: ActionLog, rank_info: RankInfo) -> None:
    """Publish every rank's rows, or end the run on every rank."""
    failure = None
    try:
        actions.close_part()
    # whatever it was, the other ranks must hear of it
    except Exception as error:
        failure = error
    if distributed.agree(failure is not None, rank_info.device):
        # the message is that rank's to give
        raise failure or SystemExit(2)


def open_folder(components: TrainingComponents, progress: Progress) -> MetricWriter:
    """Write what the run is made of and open its metrics; on rank 0."""
    components.folder.mkdir(parents=True, exist_ok=True)
    save_config(components.config, components.folder / "config.yaml")
    described = describe_run(components.rank_info.device, components.rank_info.world_size)
    with (components.folder / "started.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": progress.step, "run_id": progress.run_id, **described}) + "\n")
    return MetricWriter(components.folder, progress.step)
