"""The training loop: one start of a run, from its newest checkpoint to its last step or until it is told to stop."""

import json
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn, Protocol, runtime_checkable

from torch import Tensor

from iwm_fast.checkpoints.async_writer import CheckpointWriter
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.config.loading import save_config
from iwm_fast.engines.base import Engine
from iwm_fast.monitoring.metrics import MetricWriter
from iwm_fast.monitoring.profiler import StepProfiler
from iwm_fast.monitoring.progress_bar import open_display
from iwm_fast.pipelines.batch import Batch
from iwm_fast.runtime import distributed
from iwm_fast.runtime.error_reporting import PeerFailedError, peer_failure_message
from iwm_fast.runtime.preemption import PreemptedError, Preemption
from iwm_fast.runtime.provenance import describe_run
from iwm_fast.runtime.run_lock import FolderLock
from iwm_fast.runtime.run_status import read_status, write_status
from iwm_fast.training.log_window import LogWindow
from iwm_fast.training.nonfinite_guard import NonfiniteGuard
from iwm_fast.training.resume import find_start
from iwm_fast.training.schedules import Schedules, build_schedules
from iwm_fast.training.step import StepReport
from iwm_fast.training.task import TrainTask
from iwm_fast.training.train_state import TrainState

log = logging.getLogger(__name__)


@runtime_checkable
class Evaluator(Protocol):
    """Something measured during training; every rank has one and calls it at the same steps."""

    def prepare(self) -> None:
        """Open and check what will be needed, before the run writes anything; collective."""
        ...

    def __call__(self, teacher: dict[str, Tensor], parameters: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        """Return values for the log row; collective.

        Args:
            teacher: the teacher's weights.
            parameters: the predictor's whole float32 weights; must be used up on every rank.
        """
        ...


class Trainer:
    """Trains a task; log rows, evaluations, checkpoints, status and signals are the same for every task."""

    def __init__(
        self, task: TrainTask, *, preemption: Preemption | None = None, evaluators: Sequence[Evaluator] = ()
    ) -> None:
        """Take a task.

        Args:
            task: what to train.
            preemption: whether to stop early; None: never.
            evaluators: measured every `output.evaluate_every` steps and after the last one.
        """
        self._task: TrainTask = task
        self._preemption: Preemption = preemption or Preemption()
        self._evaluators: Sequence[Evaluator] = evaluators
        self._folder = Path(task.config.output.folder)
        self._is_main: bool = task.rank_info.rank == 0
        self._state = TrainState()
        self._is_running = False
        self._is_stopping = False
        self._resources = ExitStack()

    def run(self) -> TrainState:
        """Train from the newest checkpoint, or from scratch, until the last checkpoint is on the disk; collective.

        Raises:
            PreemptedError: on every rank, if one was told to stop.
            FloatingPointError: if too many steps in a row were not finite.
            CheckpointError: on every rank, if a checkpoint could not be written or must not be continued.
            ValueError: if another run holds the folder, or it holds one and resume is never.
        """
        lock = distributed.rank_zero_only(lambda: FolderLock(self._folder))
        try:
            saved, schedules = self._find_start()
            if self._state.step >= schedules.total_steps and saved is not None:
                log.info("%s is finished: %d steps", self._folder, schedules.total_steps)
                self._task.load_weights(saved)
                return self._state
            batches = self._open(saved, schedules)
            first = self._state.step
            while self._state.step < schedules.total_steps:
                began = time.perf_counter()
                self._stop_if_told()
                self._profiler.reach(self._state.step)
                report = self._task.step(batches, schedules, self._state)
                step_s = time.perf_counter() - began
                self._state.count(is_applied=report.is_applied, time_s=step_s, is_first=self._state.step == first)
                self._log_and_checkpoint(report, is_last=self._state.step == schedules.total_steps)
                self._preemption.record_step_duration(time.perf_counter() - began)
            self._set_status("finished")
        except Exception as error:
            self._record_failure(error)
            raise
        finally:
            self._resources.close()
            if lock is not None:
                lock.close()
        return self._state

    def _find_start(self) -> tuple[Checkpoint | None, Schedules]:
        task = self._task
        saved, run_id = find_start(task.config, task.resume_state)
        self._state = TrainState() if saved is None else task.resume_state(saved)
        self._state.run_id = run_id
        return saved, build_schedules(task.config.optim, task.shards.num_samples, self._state.start)

    def _open(self, saved: Checkpoint | None, schedules: Schedules) -> Iterator[Batch]:
        """Open everything that steps need and write what the run consists of."""
        task, config, state = self._task, self._task.config, self._state
        # before anything is written: what is wrong with data.val ends the run here
        began = time.perf_counter()
        for evaluator in self._evaluators:
            evaluator.prepare()
        self._preemption.record_step_duration(time.perf_counter() - began)
        self._engine: Engine = task.start(saved)
        self._saver = CheckpointWriter(
            config, task.rank_info, fingerprint=task.fingerprint, run_id=state.run_id, last_step=state.step
        )
        self._resources.callback(self._saver.close)
        self._writer = self._open_folder() if self._is_main else None
        self._window = LogWindow(task, schedules)
        most = config.runtime.max_skipped_steps
        self._skipped = NonfiniteGuard(self._folder, task.rank_info, most=most, remedy=task.remedy)
        self._resources.callback(task.close)
        batches = task.open_stream(state)
        self._profiler = StepProfiler(config.runtime.profile, self._folder / "profile", task.rank_info)
        self._resources.callback(lambda: self._profiler.close(state.step))
        self._display = open_display(task.rank_info, state.step, schedules.total_steps)
        self._resources.callback(self._display.close)
        self._is_running = True
        self._set_status("running")
        self._preemption.on_timeout = lambda: write_status(self._folder, "preempted", reason=self._preemption.reason)
        return batches

    def _open_folder(self) -> MetricWriter:
        task, state = self._task, self._state
        self._folder.mkdir(parents=True, exist_ok=True)
        save_config(task.config, self._folder / "config.yaml")
        described = describe_run(task.rank_info.device, task.rank_info.world_size)
        with (self._folder / "started.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": state.step, "run_id": state.run_id, **described}) + "\n")
        writer = MetricWriter(self._folder, state.step)
        self._resources.callback(writer.close)
        return writer

    def _stop_if_told(self) -> None:
        """Save and raise if any rank was told to stop; raise if rank 0 could not write a checkpoint; collective."""
        flags = [bool(self._preemption.reason), self._saver.has_failed]
        must_stop, has_failed = distributed.any_rank(flags, self._task.rank_info.device)
        if has_failed:
            # raises on every rank
            self._saver.wait()
        if must_stop:
            self._stop()

    def _stop(self) -> NoReturn:
        self._is_stopping = True
        self._preemption.suspend_deadline()
        self._save(wait=True)
        reasons = distributed.gather_objects(self._preemption.reason)
        reason = next(reason for reason in reasons if reason)
        self._set_status("preempted", reason)
        # a barrier: no rank ends, and lets its launcher end others, before that is written
        distributed.any_rank([False], self._task.rank_info.device)
        raise PreemptedError(reason, self._state.step)

    def _log_and_checkpoint(self, report: StepReport, *, is_last: bool) -> None:
        output, step = self._task.config.output, self._state.step
        self._window.add(report)
        self._display.advance(step)
        if step % output.log_every == 0 or is_last:
            values = self._window.pop_metrics(report, self._state)
            if output.evaluate_every and (step % output.evaluate_every == 0 or is_last):
                values |= self._evaluate()
            if self._writer:
                self._writer.write(step, values)
                self._display.show(step, values, loss=values[self._task.loss_name])
        self._skipped.add(step, report)
        if self._skipped.limit_reached:
            # weights and moments are those before the skipped steps, and worth continuing from
            self._save(wait=True)
            self._skipped.end_run()
        if step % output.checkpoint_every == 0 or is_last:
            self._save(wait=is_last)

    def _evaluate(self) -> dict[str, float]:
        values: dict[str, float] = {}
        for evaluator in self._evaluators:
            values |= evaluator(self._task.teacher_state(), self._engine.named_parameters("predictor."))
        return values

    def _save(self, *, wait: bool) -> None:
        """Begin a checkpoint of this step unless there is one; `wait` until it is on the disk, if asked; collective."""
        if self._saver.last_step != self._state.step:
            # the last state leaves the memory before another is copied
            self._saver.wait()
            self._task.before_checkpoint()
            self._saver.write(
                engine_state=self._engine.state(),
                teacher_state=self._task.teacher_state(),
                step=self._state.step,
                applied_steps=self._state.applied_steps,
                counters=self._state.counters(self._task.shards.num_samples),
            )
        if wait:
            self._saver.wait()

    def _set_status(self, state: str, reason: str = "") -> None:
        if self._is_main:
            write_status(self._folder, state, step=self._state.step, reason=reason)

    def _record_failure(self, error: Exception) -> None:
        """Write into the run's folder why it ends, on whichever rank that is."""
        if not self._is_running or isinstance(error, PreemptedError | PeerFailedError):
            return
        lost = peer_failure_message(error)
        # the rank that is gone may have said why itself
        if lost and read_status(self._folder).get("state") != "running":
            return
        reason = f"another rank is gone or hangs: {lost}" if lost else f"{type(error).__name__}: {error}"
        if lost and self._is_stopping:
            # all ranks had agreed to stop; whoever told them did not wait any longer and killed one
            write_status(self._folder, "preempted", reason=f"{self._preemption.reason or 'told to stop'}; {reason}")
        else:
            write_status(self._folder, "failed", step=self._state.step, reason=reason)
