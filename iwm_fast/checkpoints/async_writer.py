"""Writing checkpoints asynchronously: rank 0 writes in a thread while training continues."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

from torch import Tensor

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.config.run import OutputConfig, RunConfig
from iwm_fast.engines.portable_state import copy_to_cpu
from iwm_fast.pipelines.storage.atomic import DISK_IS_FULL, remove_folder, remove_unfinished
from iwm_fast.runtime.distributed import RankInfo, any_rank

log = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, and removes those that `output` does not keep.

    Every rank has one and calls `write` and `wait` at the same steps, because they are collective. When a checkpoint
    cannot be written, rank 0 logs the error immediately, and the next of these calls raises it on every rank, as do all
    later ones. What cannot be removed costs only disk space, so it is logged and tried again at the next checkpoint.
    """

    def __init__(
        self, config: RunConfig, rank_info: RankInfo, *, fingerprint: dict[str, Any], run_id: str, last_step: int = 0
    ) -> None:
        self.last_step: int = last_step
        """Step of the newest checkpoint, published or being written; initially the one that the run resumes from."""
        self._config: RunConfig = config
        self._rank_info: RankInfo = rank_info
        self._fingerprint: dict[str, Any] = fingerprint
        self._run_id: str = run_id
        self._run_folder: Path = Path(config.output.folder)
        self._thread: Thread | None = None
        self._failure: Exception | None = None

    @property
    def has_failed(self) -> bool:
        """Whether a checkpoint could not be written; only rank 0 knows before the next `write` or `wait`."""
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
        """Wait for the previous checkpoint, start to write this one and return its folder.

        The engine's state must be a copy, as `Engine.state` returns it. The teacher's state is copied here, so training
        may change it when this method returns. Collective: every rank must call it.

        Raises:
            CheckpointError: on every rank, if an earlier checkpoint could not be written.
        """
        self.wait()
        folder = checkpoints.checkpoint_folder(self._run_folder, step)
        if self._rank_info.rank == 0:
            checkpoint = Checkpoint(
                folder=folder,
                engine_state=engine_state,
                teacher_state={name: copy_to_cpu(tensor) for name, tensor in teacher_state.items()},
                step=step,
                applied_steps=applied_steps,
                run_id=self._run_id,
                fingerprint=self._fingerprint,
                world_size=self._rank_info.world_size,
                counters=counters or {},
                versions=checkpoints.package_versions(),
            )
            # After an exception in training, whoever owns this writer must call `close` before the process ends, as the
            # trainer does, or the checkpoint is lost: entry points end in os._exit, which waits for no thread.
            self._thread = Thread(target=self._publish, args=(checkpoint,), name="checkpoint", daemon=False)
            self._thread.start()
        self.last_step = step
        return folder

    def wait(self) -> None:
        """Wait until all checkpoints that were started are published. Collective: every rank must call it.

        Raises:
            CheckpointError: on every rank, if a checkpoint could not be written.
        """
        self.close()
        # Without this vote, rank 0 would raise alone and the other ranks would wait for it in the next step.
        if any_rank([self.has_failed], self._rank_info.device)[0]:
            folder = checkpoints.checkpoint_folder(self._run_folder, self.last_step)
            is_full = isinstance(self._failure, OSError) and self._failure.errno in DISK_IS_FULL
            raise CheckpointError(
                f"rank 0 could not write {folder}: {self._failure or 'see its message'}"
                + (", or lower output.keep_last" if is_full else "")
                + "; earlier checkpoints are complete: continue with resume=auto"
            ) from self._failure

    def close(self) -> None:
        """Wait until rank 0 has finished writing.

        Neither collective nor raising, so that a run can call it on a single rank after an error.
        """
        if self._thread:
            self._thread.join()
            self._thread = None

    def _publish(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then remove old ones; runs in the thread."""
        # A killed process leaves its unfinished folder. The lock on the run folder ensures that no other process is
        # still writing it.
        with _removal_may_fail():
            remove_unfinished(checkpoint.folder.parent)
        try:
            checkpoints.write(checkpoint, self._config)
        # An exception would end with the thread; wait() raises it on every rank instead.
        except Exception as error:
            self._failure = error
            message = "%s could not be written (%s); the run ends at the next checkpoint at the latest"
            log.error(message, checkpoint.folder, error)
            return
        # Only after the new checkpoint is on the disk, so that at every moment a complete one exists.
        folders, best = checkpoints.list_checkpoint_folders(self._run_folder), checkpoint.best_step
        for folder in checkpoints_to_delete(folders, self._config.output, best):
            with _removal_may_fail():
                remove_folder(folder)


@contextmanager
def _removal_may_fail() -> Iterator[None]:
    """Log an error of the file system instead of raising it.

    Network disks keep a file that is open elsewhere, and a file may belong to another user.
    """
    try:
        yield
    except OSError as error:
        log.warning("an old or unfinished checkpoint was not removed (%s); the next checkpoint tries again", error)


def checkpoints_to_delete(folders: list[Path], config: OutputConfig, best_step: int | None = None) -> list[Path]:
    """Return which of a run's checkpoint folders, sorted by step, to delete.

    Those that `output.keep_last` and `output.keep_every` select are kept, and so is that of the best step, if any.
    """
    keep_every = config.keep_every
    old = [folder for folder in folders[: -config.keep_last] if checkpoints.parse_step(folder) != best_step]
    return [folder for folder in old if keep_every is None or checkpoints.parse_step(folder) % keep_every]
