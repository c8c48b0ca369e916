"""Pretraining as a task of the trainer: objective, stream of samples and action log of the world model."""

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.config.batch_size import accumulation_steps
from iwm_fast.config.run import OptimConfig, RunConfig
from iwm_fast.engines.base import Engine
from iwm_fast.monitoring.throughput import build_throughput_meter
from iwm_fast.pipelines.action_log.files import truncate_from
from iwm_fast.pipelines.action_log.writer import ActionLog
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.loader import Loader
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.components import TrainingComponents
from iwm_fast.training.loaders import log_metadata, training_loader
from iwm_fast.training.resume import resumed_state
from iwm_fast.training.schedules import Schedules
from iwm_fast.training.step import train_step
from iwm_fast.training.step_report import StepReport
from iwm_fast.training.train_state import TrainState

log = logging.getLogger(__name__)


class PretrainTask:
    """Trains encoder and predictor. `TrainTask` documents the methods."""

    loss_name = "loss/prediction"

    def __init__(self, components: TrainingComponents) -> None:
        self.config: RunConfig = components.config
        self.rank_info: RankInfo = components.rank_info
        self.shards: ShardSet = components.shards
        self.fingerprint: dict[str, Any] = components.fingerprint
        self.meter = build_throughput_meter(components.config, components.rank_info)
        lower_lr = min(components.config.optim.lr / 2, OptimConfig().lr)
        self.remedy: str = (
            f"lower optim.lr, for example with resume=adjust optim.lr={lower_lr:g}, or inspect these samples and "
            "continue with resume=auto"
        )
        self._components: TrainingComponents = components
        self._accumulation: int = accumulation_steps(components.config, components.rank_info.world_size)[1]
        self._loader: Loader | None = None
        self._action_log: ActionLog | None = None

    def resume_state(self, saved: Checkpoint) -> TrainState:
        return resumed_state(saved, self.config, self.fingerprint, self.shards.num_samples)

    def load_weights(self, saved: Checkpoint) -> None:
        checkpoints.restore(saved, self._components.engine)
        self._components.teacher.load_state_dict(saved.teacher_state)

    def start(self, saved: Checkpoint | None) -> Engine:
        if saved is not None:
            self.load_weights(saved)
            self._log_resume(saved)
        log.info("%s", self.meter)
        return self._components.engine

    def _log_resume(self, saved: Checkpoint) -> None:
        log.info("resuming from %s", saved.folder)
        earlier, state = TrainState.from_checkpoint(saved), self.resume_state(saved)
        for change in state.changes[len(earlier.changes) :]:
            log.info("%(setting)s: %(from)s until step %(step)d, %(to)s from here on", change)
        if state.start != earlier.start:
            log.info(
                "epoch %d restarts, because settings of the data have changed",
                state.start.position // self.shards.num_samples,
            )

    def open_stream(self, state: TrainState) -> Iterator[Batch]:
        self._action_log = self._open_action_log(state.step)
        self._loader = training_loader(self.config, self.shards, self.rank_info, state.step, state.start)
        return map(self._action_log.add, self._loader) if self._action_log else self._loader

    def _open_action_log(self, step: int) -> ActionLog | None:
        folder = self._components.folder / "actions"
        # Steps after the checkpoint are repeated and logged again.
        distributed.rank_zero_only(lambda: truncate_from(folder, step))
        if not self.config.output.action_log:
            return None
        metadata = log_metadata(self.config, self.shards)
        return ActionLog(folder, head=metadata, shards=self.shards, rank=self.rank_info.rank)

    def step(self, batches: Iterator[Batch], schedules: Schedules, state: TrainState) -> StepReport:
        components = self._components
        return train_step(
            components.engine, components.teacher, components.objective, batches, schedules,
            applied_steps=state.applied_steps, accumulation=self._accumulation,
        )  # fmt: skip

    def teacher_state(self) -> dict[str, Tensor]:
        return self._components.teacher.state_dict()

    def before_checkpoint(self) -> None:
        """Publish the rows of all ranks in the action log, which must reach as far as the checkpoint. Collective."""
        if self._action_log is not None:
            distributed.on_every_rank(self._action_log.publish)

    def close(self) -> None:
        if self._loader is not None:
            self._loader.close()
        if self._action_log is not None:
            self._action_log.close()
