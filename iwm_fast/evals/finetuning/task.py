"""Finetuning as a task of the trainer: any module on top of a run, on augmented images or the views of pretraining."""

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
from iwm_fast.config.batch_size import accumulation_steps
from iwm_fast.config.finetuning import TrainedSettings, TuneTaskConfig
from iwm_fast.config.fingerprint import fingerprint
from iwm_fast.config.loading import config_to_dict
from iwm_fast.config.run import RunConfig
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
from iwm_fast.runtime.seeding import seeded_rng
from iwm_fast.training.loaders import finetune_loader, training_loader
from iwm_fast.training.schedules import Schedules
from iwm_fast.training.step_report import StepRecorder, StepReport
from iwm_fast.training.train_state import TrainState

log = logging.getLogger(__name__)

_MODULE_PREFIX = "trained."
# The settings of a run that affect a job's result. A job does not use its mask and objective, and replaces its optim.
_RUN_SETTINGS = ("seed", "data.", "views.", "model.")
# Settings that earlier versions lacked, with the values that correspond to what they did.
_NEW_SINCE_0_1 = {"tune.encoder": "teacher", "tune.action": "null", "tune.context": "full"}


# Entries of an origin that jobs of earlier versions lack: digests of what the digest of the shards does not cover.
LABELS_ENTRY, MAPS_ENTRY = "data.train.labels", "data.train.maps"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A module to train, with its inputs, loss and optimiser."""

    name: str
    """Name of the job and of its folder; a single word."""
    module: nn.Module
    """The module to train, which maps inputs to a tensor or to tuples, lists or dicts of tensors. It runs in the
    precision of the settings, and its outputs are converted to float32. Frozen networks belong in `prepare`; frozen
    layers are saved in checkpoints, too. Every trained parameter must contribute to the outputs of every micro-batch.
    """
    prepare: Callable[[Batch], Any]
    """Maps a micro-batch to the module's inputs and all that the loss needs, for example by a frozen encoder and mixup.
    Runs without gradient, in the precision of the settings."""
    loss: Callable[[Any, Any], Float[Tensor, ""]]
    """Maps outputs and inputs to the loss summed over the images of the micro-batch."""
    optimizer: torch.optim.AdamW
    """Optimiser whose groups are named "decay..." and "no_decay...". A group's "lr_scale" is the ratio of its peak
    learning rate to tune.lr; without it the ratio is 1."""
    origin: dict[str, Any] = field(default_factory=dict)
    """Everything else that decides the result, such as the step of the run's checkpoint and a digest of the labels, as
    JSON values. A job resumes only from a folder with the same settings and origin."""


class AutocastModule(nn.Module):
    """Runs a module under autocast. Engines do not apply an autocast context from outside to the module they wrap."""

    def __init__(self, trained: nn.Module, device_type: str, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.trained: nn.Module = trained
        self._autocast: dict[str, Any] = {"device_type": device_type, "dtype": dtype, "enabled": dtype is not None}

    def forward(self, inputs: Any) -> Any:
        """Return the module's outputs in float32."""
        with torch.autocast(**self._autocast):
            return to_float32(self.trained(inputs))


def to_float32(outputs: Any) -> Any:
    """Convert floating-point tensors, also in tuples, lists and dicts, to float32; other tensors keep their dtype."""
    if isinstance(outputs, Tensor):
        # Engines put hooks on the gradients of outputs. If an output is also an intermediate of another output, its
        # hook acts on both gradients; a view separates the output from the intermediate.
        return outputs.float().view_as(outputs) if outputs.is_floating_point() else outputs
    if isinstance(outputs, dict):
        return {name: to_float32(value) for name, value in outputs.items()}
    return tuple(to_float32(value) for value in outputs)


class FinetuneTask:
    """Trains a job's module; implements `iwm_fast.training.task.TrainTask`.

    Drop path, mixup and erasing are determined by (seed, step, micro-batch, rank), so that on a CPU a resumed job is
    equal bit for bit to one that was not interrupted.
    """

    loss_name = "loss/train"
    remedy = (
        "lower tune.lr together with name=OTHER, which trains again in another folder, or inspect these samples and "
        "run the same command again"
    )

    def __init__(
        self, job: Job, settings: TrainedSettings, config: RunConfig, *, shards: ShardSet, rank_info: RankInfo
    ) -> None:
        self.config: RunConfig = config
        self.rank_info: RankInfo = rank_info
        self.shards: ShardSet = shards
        self.fingerprint: dict[str, Any] = job_fingerprint(job, settings, config, shards)
        self.meter = ThroughputMeter(global_batch_size=config.optim.global_batch_size, num_ranks=rank_info.world_size)
        self._job: Job = job
        self._settings: TrainedSettings = settings
        self._accumulation: int = accumulation_steps(config, rank_info.world_size)[1]
        self._dtype: torch.dtype | None = compute_dtype(config)
        self._engine: Engine | None = None
        self._loader: Loader | None = None

    def resume_state(self, saved: Checkpoint) -> TrainState:
        old, new = saved.fingerprint, self.fingerprint
        # Jobs of earlier versions have no digests of labels and maps; they are resumed without this comparison.
        compared = (old.keys() | new.keys()) - ({LABELS_ENTRY, MAPS_ENTRY} - old.keys())
        changed = sorted(name for name in compared if old.get(name) != new.get(name))
        if changed:
            lines = "\n".join(f"  {name}: {old.get(name)} -> {new.get(name)}" for name in changed)
            raise CheckpointError(
                f"{Path(self.config.output.folder)} was trained with other settings (saved -> now):\n{lines}\n"
                "restore these settings, set name=OTHER to keep both results, or delete the folder to train again"
            )
        return TrainState.from_checkpoint(saved)

    @torch.no_grad()
    def load_weights(self, saved: Checkpoint) -> None:
        module = self._job.module.to(self.rank_info.device)
        # Checkpoints contain the parameters but no buffers, which follow from the settings.
        weights = saved.weights(_MODULE_PREFIX)
        for name, parameter in module.named_parameters():
            parameter.copy_(weights[name])

    def start(self, saved: Checkpoint | None) -> Engine:
        job, config = self._job, self.config
        job.module.train()
        if config.runtime.compile:
            compile_blocks(job.module)
        module = AutocastModule(job.module, self.rank_info.device.type, self._dtype)
        self._engine = build_engine(config, module, job.optimizer, self.rank_info)
        distributed.set_collective_timeout(config.runtime.rank_timeout_s)
        log.info("training %s", job.name)
        if saved is not None:
            checkpoints.restore(saved, self._engine)
            log.info("resuming from %s", saved.folder)
        return self._engine

    def open_stream(self, state: TrainState) -> Iterator[Batch]:
        settings, stream = self._settings, (self.shards, self.rank_info, state.step)
        if isinstance(settings, TuneTaskConfig):
            augment = settings.augment.operations if settings.augment.rand_augment else None
            self._loader = finetune_loader(self.config, augment, *stream)
        else:
            self._loader = training_loader(self.config, *stream)
        return self._loader

    def step(self, batches: Iterator[Batch], schedules: Schedules, state: TrainState) -> StepReport:
        assert self._engine is not None
        engine, device, applied = self._engine, self.rank_info.device, state.applied_steps
        engine.set_hyperparameters(lr=schedules.lr(applied), weight_decay=schedules.weight_decay(applied))
        record = StepRecorder(device)
        for micro_batch in range(self._accumulation):
            batch = record.next_batch(batches)
            counters = state.step, micro_batch, self.rank_info.rank
            with seeded_rng(*counters, seed=self.config.seed, device=device):
                loss = self._loss(engine, batch)
                record.timer.begin("backward")
                record.backward(engine, loss)
        record.timer.begin("optimizer")
        return record.report(engine.step())

    def _loss(self, engine: Engine, batch: Batch) -> Float[Tensor, ""]:
        autocast = torch.autocast(self.rank_info.device.type, dtype=self._dtype, enabled=self._dtype is not None)
        # The frozen encoder runs here, outside the engine, so it needs a separate autocast context.
        with torch.no_grad(), autocast:
            inputs = self._job.prepare(batch)
        outputs = engine.forward(inputs)
        # Engines sum gradients over micro-batches and ranks, so dividing by the global batch size gives the mean.
        return self._job.loss(outputs, inputs) / self.config.optim.global_batch_size

    def teacher_state(self) -> dict[str, Tensor]:
        return {}

    def before_checkpoint(self) -> None:
        """Do nothing, because finetuning has no action log."""

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()

    def release(self) -> None:
        """Detach the engine and put the unsharded module into evaluation mode. Collective: every rank must call it."""
        if self._engine is not None:
            self._engine.release()
        self._job.module.eval()


def job_fingerprint(job: Job, settings: TrainedSettings, config: RunConfig, shards: ShardSet) -> dict[str, Any]:
    """Return all values that decide a job's result, by dotted name; shards are identified by content, not by path."""
    run = fingerprint(config, shards.content_digest)
    is_masked = getattr(settings.tune, "context", "full") == "masked"
    run_settings = (*_RUN_SETTINGS, "mask.") if is_masked else _RUN_SETTINGS
    of_run = {name: value for name, value in run.items() if name.startswith(run_settings)}
    names = ("tune", "augment") if isinstance(settings, TuneTaskConfig) else ("tune",)
    groups = {name: config_to_dict(getattr(settings, name)) for name in names}
    of_job = {f"{group}.{name}": value for group, tree in groups.items() for name, value in tree.items()}
    # None equals a missing entry in comparisons, so jobs of earlier versions can be resumed.
    of_job |= {name: None for name, value in _NEW_SINCE_0_1.items() if of_job.get(name) == value}
    return of_run | of_job | {"data.label": settings.data.label} | job.origin
