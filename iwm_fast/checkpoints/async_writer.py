"""Checkpoints written beside training: rank 0 writes in a thread while the next steps are made."""

import logging
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.config.run import OutputConfig, RunConfig
from iwm_fast.engines.portable_state import copy_to_host
from iwm_fast.pipelines.storage.atomic import remove, remove_leftovers
from iwm_fast.runtime.distributed import RankInfo, any_rank

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, and removes those that are not to be kept.

    Every rank has one and calls `write` and `wait` at the same steps: they are collective. A failure is logged by
    rank 0 when it happens and raised on every rank by the next of these calls, and by each one after it.
    """

    def __init__(
        self, config: RunConfig, rank_info: RankInfo, *, fingerprint: dict[str, Any], run_id: str, last_step: int = 0
    ) -> None:
        self.last_step = last_step
        """Step of the newest checkpoint, published or under way: at first the one that the run goes on from."""
        self._config, self._rank_info = config, rank_info
        self._fingerprint, self._run_id = fingerprint, run_id
        self._run_folder = Path(config.output.folder)
        self._thread: Thread | None = None
        self._failure: Exception | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be written; no rank but 0 knows before the next `write` or `wait`."""
        return self._failure is not None

    def write(
        self,
        *,
        engine_state: dict[str, Tensor],
        teacher_state: dict[str, Tensor],
        step: int,
        applied_steps: int,
        counters: dict[str, Any] | None = None,
    ) -> Path:
        """Wait for the checkpoint before, begin this one and return where it will be; collective.

        The engine's state must be a copy, as `Engine.state` gives it; the teacher's is copied here. Both may change
        when this returns.

        Raises:
            CheckpointError: on every rank, if one before could not be written.
        """
        self.wait()
        folder = checkpoints.folder_of(self._run_folder, step)
        if self._rank_info.rank == 0:
            checkpoint = Checkpoint(
                folder=folder,
                engine_state=engine_state,
                teacher_state={name: copy_to_host(tensor) for name, tensor in teacher_state.items()},
                step=step,
                applied_steps=applied_steps,
                run_id=self._run_id,
                fingerprint=self._fingerprint,
                world_size=self._rank_info.world_size,
                counters=counters or {},
                versions=checkpoints.package_versions(),
            )
            # the interpreter does not end before it
            self._thread = Thread(target=self._publish, args=(checkpoint,), name="checkpoint", daemon=False)
            self._thread.start()
        self.last_step = step
        return folder

    def wait(self) -> None:
        """Return when all that was begun is published; collective.

        Raises:
            CheckpointError: on every rank, if one could not be written.
        """
        self.close()
        # without this vote the other ranks would wait in the next step for one that is gone
        if any_rank([self.has_failed], self._rank_info.device)[0]:
            folder = checkpoints.folder_of(self._run_folder, self.last_step)
            raise CheckpointError(
                f"rank 0 could not write {folder}: {self._failure or 'see its message'}; those before it are whole: "
                "free space there, or lower output.keep_last, and go on with resume=auto"
            ) from self._failure

    def close(self) -> None:
        """Let rank 0 finish what it has begun; not collective, and raises nothing: for the end after an error."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def _publish(self, checkpoint: Checkpoint) -> None:
        try:
            remove_leftovers(checkpoint.folder.parent)
            checkpoints.write(checkpoint, self._config)
            for old in checkpoints_to_delete(checkpoints.step_folders(self._run_folder), self._config.output):
                remove(old)
        # whatever it was, every rank must hear of it; wait() raises it on
        except Exception as error:
            self._failure = error
            log.error(
                "%s could not be written (%s); the run ends at the next one at the latest", checkpoint.folder, error
            )


def checkpoints_to_delete(folders: list[Path], kept: OutputConfig) -> list[Path]:
    """Return which of a run's checkpoints, given in order, are neither among the newest nor kept for ever."""
    every = kept.keep_every
    return [old for old in folders[: -kept.keep_last] if every is None or checkpoints.step_of(old) % every]
