"""What a `Trainer` trains: the interface of pretraining and of finetuning."""

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
from iwm_fast.training.step import StepReport
from iwm_fast.training.train_state import TrainState


@runtime_checkable
class TrainTask(Protocol):
    """Networks, data and loss; the trainer adds logs, checkpoints, signals and everything else between two steps."""

    config: RunConfig
    """Settings; `config.output.folder` is the run's."""
    rank_info: RankInfo
    shards: ShardSet
    """Training samples."""
    fingerprint: dict[str, Any]
    """What decides the result, flat and fit for JSON; kept in each checkpoint."""
    loss_name: str
    """Name of the loss in log rows."""
    remedy: str
    """What to do when the loss is not finite."""
    meter: ThroughputMeter
    """Turns durations into the speed values of log rows."""

    def resume_state(self, saved: Checkpoint) -> TrainState:
        """Return the state to continue a checkpoint from.

        Raises:
            CheckpointError: if it was written with other settings, which are listed.
        """
        ...

    def load_weights(self, saved: Checkpoint) -> None:
        """Take over the weights of a checkpoint after the last step; collective."""
        ...

    def start(self, saved: Checkpoint | None) -> Engine:
        """Return the engine of the first step, with a checkpoint's weights and moments if one is given; collective."""
        ...

    def open_stream(self, state: TrainState) -> Iterator[Batch]:
        """Open this rank's endless stream of micro-batches from the state's step on."""
        ...

    def step(self, batches: Iterator[Batch], schedules: Schedules, state: TrainState) -> StepReport:
        """Run one optimiser step; collective."""
        ...

    def teacher_state(self) -> dict[str, Tensor]:
        """Return weights to keep in a checkpoint beside the engine's; empty if there are none."""
        ...

    def before_checkpoint(self) -> None:
        """Publish what a checkpoint relies on; collective."""
        ...

    def close(self) -> None:
        """Close the stream and whatever `open_stream` opened, also after an error."""
        ...
