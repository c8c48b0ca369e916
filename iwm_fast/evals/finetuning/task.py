"""Finetuning as the trainer's task: any module on top of a run, with its own stream of single views."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.config.finetuning import TuneTask
from iwm_fast.config.fingerprint import fingerprint
from iwm_fast.config.loading import to_tree
from iwm_fast.config.run import RunConfig, accumulation_steps
from iwm_fast.engines.base import Engine
from iwm_fast.engines.factory import build_engine
from iwm_fast.models.layers import compile_blocks
from iwm_fast.models.student import compute_dtype
from iwm_fast.monitoring.throughput import ThroughputMeter
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.loader import Loader
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.loaders import finetune_loader
from iwm_fast.training.schedules import Schedules
from iwm_fast.training.seeding import seeded_rng
from iwm_fast.training.step import StepRecord, StepReport
from iwm_fast.training.train_state import TrainState

log = logging.getLogger(__name__)

_PREFIX = "trained."
# settings of the run that decide the result; the rest of its fingerprint does not matter here or comes from the task
_OF_THE_RUN = ("seed", "data.", "views.", "model.")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One module to train, and how its loss comes from a micro-batch."""

    name: str
    """One word; its folder is called so."""
    module: nn.Module
    """What is trained: forward(inputs) -> outputs, tensors or tuples, lists, dicts of them. It runs in the precision
    of the settings and its outputs arrive as float32. Frozen networks are not inside it, and each parameter must have
    a share in each micro-batch's outputs."""
    prepare: Callable[[Batch], Any]
    """Turns a micro-batch into the module's inputs and whatever the loss needs: frozen encoder, labels, mixing. Runs
    without gradient, in the same precision."""
    loss: Callable[[Any, Any], Float[Tensor, ""]]
    """Of outputs and inputs: the sum over the micro-batch's images; it is divided by the global batch."""
    optimizer: torch.optim.AdamW
    """With groups named "decay..." and "no_decay...", each with its "lr_scale" if that is not 1: the group's peak
    learning rate over tune.lr. See `iwm_fast.engines.optimizer.scaled_optimizer`."""
    origin: dict[str, Any] = field(default_factory=dict)
    """What else decides the result, fit for JSON, such as the step of the run's checkpoint: a job whose settings or
    origin differ from those of its folder is not resumed."""


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


class FinetuneTask:
    """Trains a job's module; see `iwm_fast.training.task.TrainTask`.

    All that is drawn (drop path, mixing, erasing) follows from (seed, step, micro-batch, rank), so a job that was
    stopped continues bit for bit on a CPU.
    """

    loss_name = "loss/train"
    remedy = "lower tune.lr or look at these samples"

    def __init__(self, job: Job, task: TuneTask, config: RunConfig, *, shards: ShardSet, rank_info: RankInfo) -> None:
        self.config: RunConfig = config
        self.rank_info: RankInfo = rank_info
        self.shards: ShardSet = shards
        self.fingerprint: dict[str, Any] = job_fingerprint(job, task, config, shards)
        self.meter = ThroughputMeter(global_batch_size=config.optim.global_batch_size, num_ranks=rank_info.world_size)
        self._job: Job = job
        self._augment = task.augment.operations if task.augment.rand_augment else None
        self._accumulation: int = accumulation_steps(config, rank_info.world_size)[1]
        self._dtype = compute_dtype(config)
        self._engine: Engine | None = None
        self._loader: Loader | None = None

    def resume_state(self, saved: Checkpoint) -> TrainState:
        old, new = saved.fingerprint, self.fingerprint
        names = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
        if names:
            rows = "\n".join(f"  {name}: {old.get(name)} -> {new.get(name)}" for name in names)
            raise CheckpointError(
                f"{Path(self.config.output.folder)} was trained with other settings (saved -> now):\n{rows}\n"
                "set them back, give name=OTHER to keep both, or delete that folder to train anew"
            )
        return TrainState.from_checkpoint(saved)

    @torch.no_grad()
    def load_weights(self, saved: Checkpoint) -> None:
        module = self._job.module.to(self.rank_info.device)
        weights = saved.weights(_PREFIX)
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])

    def start(self, saved: Checkpoint | None) -> Engine:
        job, config = self._job, self.config
        job.module.train()
        if config.runtime.compile:
            compile_blocks(job.module)
        wrapped = InPrecision(job.module, self.rank_info.device.type, self._dtype)
        self._engine = build_engine(config, wrapped, job.optimizer, self.rank_info)
        distributed.set_collective_timeout(config.runtime.rank_timeout_s)
        log.info("training %s", job.name)
        if saved is not None:
            checkpoints.restore(saved, self._engine)
            log.info("going on from %s", saved.folder)
        return self._engine

    def open_stream(self, state: TrainState) -> Iterator[Batch]:
        self._loader = finetune_loader(self.config, self._augment, self.shards, self.rank_info, state.step)
        return self._loader

    def step(self, batches: Iterator[Batch], schedules: Schedules, state: TrainState) -> StepReport:
        assert self._engine is not None
        engine, device, applied = self._engine, self.rank_info.device, state.applied_steps
        engine.set_hyperparameters(lr=schedules.lr(applied), weight_decay=schedules.weight_decay(applied))
        record = StepRecord(device)
        for micro in range(self._accumulation):
            batch = record.next_batch(batches)
            counters = state.step, micro, self.rank_info.rank
            with seeded_rng(*counters, seed=self.config.seed, device=device):
                loss = self._loss(engine, batch)
                record.timer.begin("backward")
                record.backward(engine, loss)
        record.timer.begin("optimizer")
        return record.report(engine.step())

    def _loss(self, engine: Engine, batch: Batch) -> Float[Tensor, ""]:
        autocast = torch.autocast(self.rank_info.device.type, dtype=self._dtype, enabled=self._dtype is not None)
        with torch.no_grad(), autocast:
            inputs = self._job.prepare(batch)
        outputs = engine.forward(inputs)
        return self._job.loss(outputs, inputs) / self.config.optim.global_batch_size

    def teacher_state(self) -> dict[str, Tensor]:
        return {}

    def before_checkpoint(self) -> None:
        """Do nothing: there is no action log."""

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def release(self) -> None:
        """Give the module back for evaluation, with whole weights on every rank; the engine ends; collective."""
        if self._engine is not None:
            self._engine.release()
        self._job.module.eval()


def job_fingerprint(job: Job, task: TuneTask, config: RunConfig, shards: ShardSet) -> dict[str, Any]:
    """Return what decides the result of a job, flat; samples by content instead of by path."""
    run = fingerprint(config, shards.content_digest)
    kept = {name: value for name, value in run.items() if name.startswith(_OF_THE_RUN)}
    groups = {name: to_tree(getattr(task, name)) for name in ("tune", "augment")}
    of_the_task = {f"{group}.{name}": value for group, tree in groups.items() for name, value in tree.items()}
    return kept | of_the_task | {"data.label": task.data.label} | job.origin
