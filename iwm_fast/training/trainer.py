"""The training loop, from a run's newest checkpoint to its last step or to a request to stop."""

import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NoReturn, Protocol, runtime_checkable

from torch import Tensor

from iwm_fast.checkpoints.async_writer import CheckpointWriter
from iwm_fast.checkpoints.checkpoint import CONFIG, Checkpoint
from iwm_fast.config.loading import save_config
from iwm_fast.engines.base import Engine
from iwm_fast.monitoring.metric_writer import MetricWriter, open_loggers
from iwm_fast.monitoring.out_of_memory import TrainingMemoryError, memory_errors_explained
from iwm_fast.monitoring.profiler import StepProfiler
from iwm_fast.monitoring.progress_bar import open_display
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.storage.atomic import DiskError, replace_file
from iwm_fast.runtime import distributed
from iwm_fast.runtime.error_reporting import PeerFailedError, peer_failure_message
from iwm_fast.runtime.json_lines import STARTED_FILE, append_line
from iwm_fast.runtime.preemption import PreemptedError, Preemption
from iwm_fast.runtime.provenance import describe_run
from iwm_fast.runtime.run_lock import RunLock
from iwm_fast.runtime.run_status import read_status, write_status
from iwm_fast.training.log_window import LogWindow
from iwm_fast.training.nonfinite_guard import MAX_WEIGHT, NonfiniteGuard, have_diverged
from iwm_fast.training.resume import find_resume_point, set_aside_unusable_files
from iwm_fast.training.schedules import Schedules, build_schedules
from iwm_fast.training.step_report import StepReport
from iwm_fast.training.task import TrainTask
from iwm_fast.training.train_state import TrainState

log = logging.getLogger(__name__)


@runtime_checkable
class Evaluator(Protocol):
    """A measurement during training. Every rank has an evaluator and calls it at the same steps."""

    def prepare(self) -> None:
        """Open and check what the evaluator needs, before the run writes anything. Collective."""
        ...

    def __call__(self, teacher: dict[str, Tensor], parameters: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
        """Return metrics for the log row. Collective.

        Args:
            teacher: weights of the teacher.
            parameters: unpartitioned float32 weights of the predictor. Every rank must exhaust the iterator, because
                ZeRO stage 3 gathers each weight.
        """
        ...


class Trainer:
    """Trains a task: runs its steps and writes log rows, evaluations, checkpoints and the status of the run."""

    def __init__(
        self, task: TrainTask, *, preemption: Preemption | None = None, evaluators: Sequence[Evaluator] = ()
    ) -> None:
        """Prepare to train; nothing is read or written before `run`.

        Args:
            task: what to train.
            preemption: request to stop early, set by a signal for instance; None to never stop.
            evaluators: called every `output.evaluate_every` steps and after the last one.
        """
        self._task: TrainTask = task
        self._preemption: Preemption = preemption or Preemption()
        self._evaluators: Sequence[Evaluator] = evaluators
        self._folder = Path(task.config.output.folder)
        self._is_main: bool = task.rank_info.rank == 0
        self._state = TrainState()
        # For messages about exhausted memory.
        self._doing = "the start"
        self._is_running = False
        self._is_stopping = False
        # Closed in reverse order of opening when the run ends, also after an error.
        self._resources = ExitStack()

    def run(self) -> TrainState:
        """Train from the newest checkpoint, or from scratch, until the last checkpoint is on disk.

        Collective: every rank must call it.

        Raises:
            PreemptedError: on every rank, if one of them was asked to stop.
            FloatingPointError: if too many consecutive steps were not finite.
            CheckpointError: on every rank, if a checkpoint cannot be written, or was written with other settings.
            ValueError: if another process is training in the folder, or it holds a run and `resume` is never.
            TrainingMemoryError: on one rank, if memory is exhausted.
        """
        # Two runs in one folder would overwrite each other's metrics and checkpoints.
        lock = distributed.rank_zero_only(lambda: RunLock(self._folder))
        try:
            with memory_errors_explained(self._task.config, self._task.rank_info, lambda: self._doing):
                schedules, batches = self._prepare()
                first_step = self._state.step
                while batches is not None and self._state.step < schedules.total_steps:
                    began = time.perf_counter()
                    self._doing = f"step {self._state.step + 1}"
                    self._stop_if_requested()
                    self._profiler.before_step(self._state.step)
                    report = self._task.step(batches, schedules, self._state)
                    step_s = time.perf_counter() - began
                    is_first = self._state.step == first_step
                    self._state.record_step(is_applied=report.is_applied, time_s=step_s, is_first=is_first)
                    self._log_and_checkpoint(report, is_last=self._state.step == schedules.total_steps)
                    # Its tokens would take memory during the next step.
                    del report
                    # Includes log rows, evaluations and checkpoints: a request to stop waits for all of them.
                    self._preemption.record_step_duration(time.perf_counter() - began)
                if batches is not None:
                    self._set_status("finished")
        except Exception as error:
            self._record_failure(error)
            raise
        finally:
            self._resources.close()
            if lock is not None:
                lock.close()
        return self._state

    def _prepare(self) -> tuple[Schedules, Iterator[Batch] | None]:
        """Load the newest checkpoint; return the schedules and the stream of micro-batches, None if no step remains."""
        saved, schedules = self._load_state()
        if self._state.step > schedules.total_steps:
            raise ValueError(
                f"optim.epochs = {self._task.config.optim.epochs:g} means {schedules.total_steps} steps, but "
                f"{self._folder} is at step {self._state.step} already; raise it"
            )
        if self._state.step == schedules.total_steps and saved is not None:
            log.info("%s is already finished: %d steps", self._folder, schedules.total_steps)
            # The caller may want to evaluate the trained networks.
            self._task.load_weights(saved)
            return schedules, None
        # The tensors of the checkpoint are freed on return. They would fill the host's memory as long as the run lasts.
        return schedules, self._open(saved, schedules)

    def _load_state(self) -> tuple[Checkpoint | None, Schedules]:
        """Set the training state to that of the newest checkpoint; return the checkpoint and the schedules."""
        task = self._task
        saved, run_id = find_resume_point(task.config, task.resume_state)
        self._state = TrainState() if saved is None else task.resume_state(saved)
        self._state.run_id = run_id
        return saved, build_schedules(task.config.optim, task.shards.num_samples, self._state.start)

    def _open(self, saved: Checkpoint | None, schedules: Schedules) -> Iterator[Batch]:
        """Open everything that steps need, write the settings of the run, and return the stream of micro-batches."""
        task, config, state = self._task, self._task.config, self._state
        # Evaluators come first, so that unusable validation shards end the run before anything is written.
        began = time.perf_counter()
        for evaluator in self._evaluators:
            evaluator.prepare()
        self._preemption.record_step_duration(time.perf_counter() - began)
        self._engine: Engine = task.start(saved)
        # Without its tensors, which are not needed any more.
        self._resumed_from = saved and replace(saved, engine_state={}, teacher_state={})
        self._saver = CheckpointWriter(
            config, task.rank_info, fingerprint=task.fingerprint, run_id=state.run_id, last_step=state.step
        )
        self._resources.callback(self._saver.close)
        # From here on, an error is a failure of this run. Before, it may concern settings that must not touch a run
        # that is already in the folder.
        self._is_running = True
        self._writer = self._open_folder() if self._is_main else None
        self._window = LogWindow(task, schedules, state.log_totals)
        limit = config.runtime.max_skipped_steps
        self._guard = NonfiniteGuard(
            self._folder, task.rank_info, state=state, max_skipped_steps=limit, remedy=task.remedy
        )
        self._resources.callback(task.close)
        batches = task.open_stream(state)
        self._profiler = StepProfiler(config.runtime.profile, self._folder / "profile", task.rank_info)
        self._resources.callback(lambda: self._profiler.close(state.step))
        self._display = open_display(task.rank_info, state.step, schedules.total_steps)
        self._resources.callback(self._display.close)
        self._set_status("running")
        # Called by the watching thread when no checkpoint was possible in time. It names no step, because there is no
        # checkpoint of the current one.
        self._preemption.on_timeout = lambda: write_status(self._folder, "preempted", reason=self._preemption.reason)
        return batches

    def _open_folder(self) -> MetricWriter:
        task, state = self._task, self._state
        set_aside_unusable_files(self._folder)
        replace_file(self._folder / CONFIG, lambda draft: save_config(task.config, draft))
        description = describe_run(task.rank_info.device, task.rank_info.world_size)
        changes = [change for change in state.changes if change["step"] == state.step]
        row = {"step": state.step, "run_id": state.run_id, "changes": changes, **description}
        append_line(self._folder / STARTED_FILE, row)
        writer = MetricWriter(self._folder, state.step)
        self._resources.callback(writer.close)
        writer.loggers += open_loggers(task.config, state.run_id, state.step)
        return writer

    def _stop_if_requested(self) -> None:
        """Save and raise PreemptedError if any rank was asked to stop; raise if rank 0 could not write a checkpoint.

        Collective: ranks receive signals at different moments and must leave the loop at the same step.
        """
        flags = [bool(self._preemption.reason), self._saver.has_failed]
        must_stop, has_failed = distributed.any_rank(flags, self._task.rank_info.device)
        if has_failed:
            # Raises CheckpointError on every rank.
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
        # Serves as a barrier. When a rank exits, a launcher may kill the others, so the status must be written first.
        distributed.any_rank([False], self._task.rank_info.device)
        raise PreemptedError(reason, self._state.step)

    def _log_and_checkpoint(self, report: StepReport, *, is_last: bool) -> None:
        output, step, is_best = self._task.config.output, self._state.step, False
        self._window.add(report)
        self._display.advance(step)
        if step % output.log_every == 0 or is_last:
            metrics = self._window.pop_metrics(report, self._state)
            if output.evaluate_every and (step % output.evaluate_every == 0 or is_last):
                metrics |= self._evaluate()
                is_best = self._record_evaluation(metrics)
            if self._writer:
                self._writer.write(step, metrics)
                self._display.show(step, metrics, loss=metrics[self._task.loss_name])
        # After the log row, so that metrics.jsonl shows the skipped steps that ended the run.
        self._guard.add(step, report)
        if self._guard.limit_reached:
            self._guard.end_run(self._save_last_good_state())
        # Equal weights are not saved again and again, because output.keep_last would then remove other states.
        is_new = self._state.skipped_in_a_row <= 1
        if (step % output.checkpoint_every == 0 and is_new) or is_last or is_best:
            self._save(wait=is_last)

    def _save_last_good_state(self) -> str:
        """Save the state before the skipped steps, which changed nothing, and say so in a sentence. Collective."""
        resumed = self._resumed_from
        if resumed is None or self._state.applied_steps > resumed.applied_steps:
            self._save(wait=True)
            return f"the state before them is saved as step {self._state.step}"
        return (
            f"no step has been finite since the checkpoint of step {resumed.step}, from which this start resumed: "
            f"if it has diverged, move {resumed.folder} away to resume from an earlier one"
        )

    def _evaluate(self) -> dict[str, float]:
        self._doing = f"the evaluation after step {self._state.step}"
        metrics: dict[str, float] = {}
        for evaluator in self._evaluators:
            metrics |= evaluator(self._task.teacher_state(), self._engine.named_parameters("predictor."))
        return metrics

    def _record_evaluation(self, metrics: dict[str, float]) -> bool:
        """Return whether this step is the best one by `output.keep_best`, and add the best step to the metrics."""
        metric = self._task.config.output.keep_best
        if metric is None:
            return False
        is_best = self._state.record_evaluation(metric, metrics[f"eval/{metric}"])
        if self._state.best is not None:
            metrics["eval/best_step"] = self._state.best.step
        return is_best

    def _save(self, *, wait: bool) -> None:
        """Start writing a checkpoint of this step unless there is one. Collective.

        With `wait`, which is for the last checkpoint of this start, return when it is on disk.

        Raises:
            FloatingPointError: if the weights have diverged; older checkpoints stay as they are.
        """
        if self._saver.last_step != self._state.step:
            self._doing = f"the checkpoint of step {self._state.step}"
            # The copy of the previous state must be written and freed before the next one is made.
            self._saver.wait()
            self._require_sound_weights()
            self._state.log_totals = self._window.totals()
            # A resumed run repeats the steps after its checkpoint only, so logs must be complete up to it.
            self._task.before_checkpoint()
            if self._writer:
                self._writer.force_to_disk()
            self._saver.write(
                engine_state=self._engine.state(),
                teacher_state=self._task.teacher_state(),
                step=self._state.step,
                applied_steps=self._state.applied_steps,
                counters=self._state.counters(self._task.shards.num_samples),
            )
        if wait:
            # All ranks have done their part, so a request to stop must not end the process before rank 0 has written.
            self._preemption.suspend_deadline()
            self._saver.wait()

    def _require_sound_weights(self) -> None:
        """End the run if the weights have diverged, because no later step can be finite. Collective."""
        trained = (weight for _, weight in self._engine.named_parameters())
        has_diverged = have_diverged(chain(trained, self._task.teacher_state().values()))
        if distributed.any_rank([has_diverged], self._task.rank_info.device)[0]:
            last = self._saver.last_step
            newest = f"the newest checkpoint is step {last}" if last else "there is no checkpoint"
            self._guard.end_run(
                f"the weights of step {self._state.step} have diverged and were not saved: one of them is not finite "
                f"or above {MAX_WEIGHT:g}, and {newest}"
            )

    def _set_status(self, state: str, reason: str = "") -> None:
        if self._is_main:
            write_status(self._folder, state, step=self._state.step, reason=reason)

    def _record_failure(self, error: Exception) -> None:
        """Write into the run folder why the run ends. Any rank may be the one that failed."""
        is_of_this_run = self._is_running or isinstance(error, TrainingMemoryError)
        if not is_of_this_run or isinstance(error, PreemptedError | PeerFailedError):
            return
        if isinstance(error, DiskError):
            error.add_note("resume=auto continues from the newest checkpoint")
        try:
            self._write_failure(error)
        # The disk that ended the run may not take its status either. The first error is the one to report.
        except DiskError as status_error:
            error.add_note(str(status_error))

    def _write_failure(self, error: Exception) -> None:
        peer_failure = peer_failure_message(error)
        # The rank that failed may have written the actual reason already.
        if peer_failure and read_status(self._folder).get("state") != "running":
            return
        own_failure = f"{type(error).__name__}: {error}"
        reason = f"another rank is gone or hangs: {peer_failure}" if peer_failure else own_failure
        if peer_failure and self._is_stopping:
            # All ranks had agreed to stop, and the scheduler or launcher killed one before its checkpoint was written.
            stop_reason = self._preemption.reason or "asked to stop"
            write_status(self._folder, "preempted", reason=f"{stop_reason}; {reason}")
        else:
            write_status(self._folder, "failed", step=self._state.step, reason=reason)
