"""The interface between `Trainer` and what it trains: pretraining or finetuning."""

from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.config.run import RunConfig
from iwm_fast.engines.base import Engine
from iwm_fast.monitoring.throughput import ThroughputMeter
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.schedules import Schedules
from iwm_fast.training.step_report import StepReport
from iwm_fast.training.train_state import TrainState


@runtime_checkable
class TrainTask(Protocol):
    """Networks, data and loss. The trainer adds everything between two steps: logs, checkpoints, signals."""

    config: RunConfig
    """Settings of the run; results go to `config.output.folder`."""
    rank_info: RankInfo
    shards: ShardSet
    """Training samples."""
    fingerprint: dict[str, Any]
    """Settings that determine the result, as a flat dict that JSON can represent; saved in each checkpoint."""
    loss_name: str
    """Metric name of the loss in log rows."""
    remedy: str
    """What the user can do about a non-finite loss, for the error message."""
    meter: ThroughputMeter
    """Converts step times into the speed metrics of log rows."""

    def resume_state(self, saved: Checkpoint) -> TrainState:
        """Return the training state to resume from a checkpoint.

        Raises:
            CheckpointError: if the checkpoint was written with other settings; the message lists them.
        """
        ...

    def load_weights(self, saved: Checkpoint) -> None:
        """Load the weights of the checkpoint of a finished run. Collective."""
        ...

    def start(self, saved: Checkpoint | None) -> Engine:
        """Return the engine, with weights and optimiser state of the checkpoint unless that is None. Collective."""
        ...

    def open_stream(self, state: TrainState) -> Iterator[Batch]:
        """Open this rank's endless stream of micro-batches, from the step of `state` on."""
        ...

    def step(self, batches: Iterator[Batch], schedules: Schedules, state: TrainState) -> StepReport:
        """Run one optimiser step. Collective."""
        ...

    def teacher_state(self) -> dict[str, Tensor]:
        """Return the teacher's weights, which a checkpoint saves beside the engine's; empty without a teacher."""
        ...

    def before_checkpoint(self) -> None:
        """Write to disk what must not be older than the checkpoint about to be saved. Collective."""
        ...

    def close(self) -> None:
        """Close everything that `open_stream` opened; also called after an error."""
        ...
