"""The loop over a job's steps: from where it stands to its end, or until it is told to stop."""

import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.async_writer import CheckpointWriter
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.config.finetuning import TuneTask
from iwm_fast.config.run import RunConfig, accumulation_steps
from iwm_fast.engines.factory import build_engine
from iwm_fast.evals.finetuning.log_window import SkipCount, TunedStep, TuneLog
from iwm_fast.evals.finetuning.state import Standing, find_standing, job_fingerprint
from iwm_fast.models.layers import compile_blocks
from iwm_fast.models.student import compute_dtype
from iwm_fast.monitoring.metrics import MetricWriter
from iwm_fast.monitoring.profiler import StepProfiler
from iwm_fast.monitoring.progress_bar import open_display
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.preemption import OF_PROCESS, PreemptedError
from iwm_fast.runtime.run_lock import FolderLock
from iwm_fast.runtime.run_status import write_status
from iwm_fast.training.loaders import finetune_loader
from iwm_fast.training.schedules import build_schedules
from iwm_fast.training.seeding import drawing_from
from iwm_fast.training.task import Job, Tuned

log = logging.getLogger("iwm_fast")

_PREFIX = "trained."


class InPrecision(nn.Module):
    """A module run in the settings' precision: engines let no autocast from outside reach what they wrap."""

    def __init__(self, trained: nn.Module, device_type: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.trained = trained
        self._autocast: dict[str, Any] = {"device_type": device_type, "dtype": dtype, "enabled": dtype is not None}

    def forward(self, inputs: Any) -> Any:
        """Return the module's outputs in float32."""
        with torch.autocast(**self._autocast):
            return in_float32(self.trained(inputs))


def in_float32(outputs: Any) -> Any:
    """Return outputs, tensors or tuples, lists or dicts of them, in float32; whole numbers stay what they are."""
    if isinstance(outputs, Tensor):
        # a view: an engine's gradient hook would act twice on a tensor that another output is computed from
        return outputs.float().view_as(outputs) if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        return {name: in_float32(part) for name, part in outputs.items()}
    return tuple(in_float32(part) for part in outputs)


def run_job(job: Job, task: TuneTask, config: RunConfig, *, shards: ShardSet, rank_info: RankInfo) -> Tuned:
    """Train a job in config.output.folder; see `iwm_fast.evals.finetuning.run.tune`."""
    folder, locks = Path(config.output.folder), list[FolderLock]()
    distributed.on_rank_zero(lambda: locks.append(FolderLock(folder)))
    try:
        identity = job_fingerprint(job, task, config, shards)
        standing, saved = find_standing(folder, identity)
        total_steps = build_schedules(config.optim, shards.num_samples).total_steps
        if saved is None or standing.step < total_steps:
            loop = TuneLoop(job, task, config, identity, shards=shards, rank_info=rank_info)
            loop.run(standing, saved)
        else:
            log.info("%s is finished: %d steps", folder, total_steps)
            _take_weights(job.module.to(rank_info.device), saved)
    finally:
        for lock in locks:
            lock.close()
    job.module.eval()
    num_tuned = sum(parameter.numel() for parameter in job.module.parameters() if parameter.requires_grad)
    return standing.tuned(num_tuned, config.optim.global_batch_size)


@torch.no_grad()
def _take_weights(module: nn.Module, saved: Checkpoint) -> None:
    weights = saved.weights(_PREFIX)
    for name, parameter in module.named_parameters():
        parameter.copy_(weights[name])


class TuneLoop:
    """Makes the steps of a job, and everything that is done between them."""

    def __init__(
        self,
        job: Job,
        task: TuneTask,
        config: RunConfig,
        identity: dict[str, Any],
        *,
        shards: ShardSet,
        rank_info: RankInfo,
    ) -> None:
        self._job, self._task, self._config, self._rank_info = job, task, config, rank_info
        self._identity, self._shards = identity, shards
        self._folder = Path(config.output.folder)
        self._micro_batch_size, self._accumulation = accumulation_steps(config, rank_info.world_size)
        self._schedules = build_schedules(config.optim, shards.num_samples)
        self._dtype = compute_dtype(config)

    def run(self, standing: Standing, saved: Checkpoint | None) -> None:
        """Go on from a checkpoint, or begin, and bring the job to its end.

        Raises:
            PreemptedError, FloatingPointError, CheckpointError: see `iwm_fast.evals.finetuning.run.tune`.
        """
        self._standing = standing
        self._open(saved)
        try:
            self._go()
        except Exception as error:
            if self._rank_info.rank == 0 and not isinstance(error, PreemptedError):
                self._note("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            self._close()
        self._engine.release()

    def _open(self, saved: Checkpoint | None) -> None:
        job, config, rank_info = self._job, self._config, self._rank_info
        job.module.train()
        if config.runtime.compile:
            compile_blocks(job.module)
        wrapped = InPrecision(job.module, rank_info.device.type, self._dtype)
        self._engine = build_engine(config, wrapped, job.optimizer, rank_info)
        distributed.limit_waiting(config.runtime.rank_timeout_s)
        step = self._standing.step
        if saved is not None:
            checkpoints.restore(saved, self._engine)
            log.info("going on from %s", saved.folder)
        self._saver = CheckpointWriter(
            config, rank_info, fingerprint=self._identity, run_id=self._standing.run_id, last_step=step
        )
        operations = self._task.augment.operations if self._task.augment.rand_augment else None
        self._loader = finetune_loader(config, operations, self._shards, rank_info, step)
        self._writer = MetricWriter(self._folder, step) if rank_info.rank == 0 else None
        self._log = TuneLog(config.optim.global_batch_size, rank_info)
        self._skipped = SkipCount(rank_info, config.runtime.max_skipped_steps)
        self._profiler = StepProfiler(config.runtime.profile, self._folder / "profile", rank_info)
        self._display = open_display(rank_info, step, self._schedules.total_steps)
        OF_PROCESS.before_giving_up = lambda: write_status(self._folder, "preempted", reason=OF_PROCESS.reason)
        self._note("running")

    def _go(self) -> None:
        standing, first = self._standing, self._standing.step
        log.info("training %s: %d steps", self._job.name, self._schedules.total_steps)
        while standing.step < self._schedules.total_steps:
            began = time.perf_counter()
            flags = [bool(OF_PROCESS.reason), self._saver.has_failed]
            must_stop, has_failed = distributed.agree_on_each(flags, self._rank_info.device)
            if has_failed:
                # says so on every rank
                self._saver.wait()
            if must_stop:
                self._stop()
            step = self._step()
            self._count(step, time.perf_counter() - began, is_first=standing.step == first)
            self._write_down(step)
            OF_PROCESS.note_step(time.perf_counter() - began)
        self._note("finished")

    def _count(self, step: TunedStep, time_s: float, *, is_first: bool) -> None:
        standing = self._standing
        standing.step += 1
        standing.applied_steps += step.is_applied
        standing.time_s += time_s
        if not is_first:
            standing.timed_steps += 1
            standing.timed_s += time_s

    def _step(self) -> TunedStep:
        number, applied = self._standing.step, self._standing.applied_steps
        self._profiler.reach(number)
        lr = self._schedules.lr(applied)
        self._engine.set_hyperparameters(lr=lr, weight_decay=self._schedules.weight_decay(applied))
        losses, keys, wait_s = [], [], 0.0
        for micro in range(self._accumulation):
            began = time.perf_counter()
            batch = next(self._loader)
            wait_s += time.perf_counter() - began
            counters = number, micro, self._rank_info.rank
            with drawing_from(*counters, seed=self._config.seed, device=self._rank_info.device):
                loss = self._loss(batch)
                self._engine.backward(loss)
            losses.append(loss.detach())
            keys += batch.key
        outcome = self._engine.step()
        return TunedStep(
            loss=torch.stack(losses).sum(),
            is_applied=outcome.applied,
            grad_norm=outcome.grad_norm,
            lr=lr,
            wait_s=wait_s,
            keys=keys,
        )

    def _loss(self, batch: Any) -> Tensor:
        autocast = torch.autocast(self._rank_info.device.type, dtype=self._dtype, enabled=self._dtype is not None)
        with torch.no_grad(), autocast:
            inputs = self._job.prepare(batch)
        outputs = self._engine.forward(inputs)
        return self._job.loss(outputs, inputs) / self._config.optim.global_batch_size

    def _write_down(self, report: TunedStep) -> None:
        output, step = self._config.output, self._standing.step
        is_last = step == self._schedules.total_steps
        self._log.add(report)
        self._display.advance(step)
        if step % output.log_every == 0 or is_last:
            values = self._log.close()
            if self._writer:
                self._writer.write(step, values)
                # the display's word for what is minimised
                self._display.show(step, values | {"loss/prediction": values["loss/train"]})
        self._skipped.add(step, report)
        if self._skipped.is_hopeless:
            self._save(must_be_published=True)
            self._skipped.end()
        if step % output.checkpoint_every == 0 or is_last:
            self._save(must_be_published=is_last)

    def _save(self, *, must_be_published: bool) -> None:
        standing = self._standing
        if self._saver.last_step != standing.step:
            self._saver.wait()
            self._saver.write(
                engine_state=self._engine.state(),
                teacher_state={},
                step=standing.step,
                applied_steps=standing.applied_steps,
                counters=standing.counters,
            )
        if must_be_published:
            self._saver.wait()

    def _stop(self) -> None:
        self._save(must_be_published=True)
        reasons = distributed.gather_objects(OF_PROCESS.reason)
        reason = next(reason for reason in reasons if reason)
        self._note("preempted", reason)
        # no rank ends, and lets its launcher end others, before that is written
        distributed.agree(False, self._rank_info.device)
        raise PreemptedError(reason, self._standing.step)

    def _note(self, state: str, reason: str = "") -> None:
        if self._rank_info.rank == 0:
            write_status(self._folder, state, step=self._standing.step, reason=reason)

    def _close(self) -> None:
        self._display.close()
        self._profiler.close(self._standing.step)
        self._loader.close()
        if self._writer:
            self._writer.close()
        self._saver.close()
