"""Where training resumes: from which checkpoint, and at which position of the stream of samples."""

import logging
import os
import uuid
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.config.fingerprint import defines_sample_stream
from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.metrics import METRICS_FILE
from iwm_fast.pipelines.sampling.batch_plan import StreamStart
from iwm_fast.pipelines.storage.atomic import set_aside
from iwm_fast.runtime import distributed
from iwm_fast.runtime.json_lines import STARTED_FILE
from iwm_fast.runtime.run_status import STATUS_FILE, read_status
from iwm_fast.training.loaders import open_training_shards
from iwm_fast.training.nonfinite_guard import MAX_WEIGHT, have_diverged
from iwm_fast.training.train_state import TrainState

log = logging.getLogger(__name__)


def find_resume_point(config: RunConfig, require_same: Callable[[Checkpoint], Any]) -> tuple[Checkpoint | None, str]:
    """Return the newest complete checkpoint in `output.folder` (None to start from scratch), and the run's id.

    Newer checkpoints that are refused are moved aside, so that their steps can be saved again. Collective: every rank
    must call it.

    Args:
        config: settings of the run.
        require_same: called with the checkpoint on rank 0; raises CheckpointError if its settings differ.

    Raises:
        ValueError: if the folder holds a run and `resume` is never.
        CheckpointError: if there are checkpoints but none is complete, if the weights of the newest have diverged, or
            if `require_same` raises it.
    """
    resume_point: tuple[Checkpoint | None, str] | None = distributed.rank_zero_only(
        lambda: _find_on_this_rank(config, require_same)
    )
    # Only the path is broadcast. The other ranks read the gigabytes of a checkpoint from disk.
    folder, run_id = distributed.broadcast_from_rank_zero(lambda: _path_and_id(resume_point))
    if folder is None:
        return None, run_id
    saved = resume_point[0] if resume_point else None
    # On one rank the disk may fail, or not show the checkpoint yet.
    return distributed.on_every_rank(lambda: saved or checkpoints.read(folder)), run_id


def _path_and_id(resume_point: tuple[Checkpoint | None, str] | None) -> tuple[Path | None, str]:
    saved, run_id = resume_point or (None, "")
    return (saved.folder if saved else None), run_id


def _find_on_this_rank(config: RunConfig, require_same: Callable[[Checkpoint], Any]) -> tuple[Checkpoint | None, str]:
    folder = Path(config.output.folder)
    is_used = bool(checkpoints.list_checkpoint_folders(folder)) or (folder / METRICS_FILE).exists()
    if is_used and config.resume == "never":
        raise ValueError(
            f"output.folder = {config.output.folder!r} already holds a run; "
            "set resume=auto to resume it, or name another folder"
        )
    saved, refused = checkpoints.read_newest(folder)
    if saved is None:
        return None, [uuid.uuid4().hex[:12], *checkpoints.list_run_ids(folder)][-1]
    # Checked before refused checkpoints are moved: a run that is refused must leave the folder unchanged.
    require_same(saved)
    weights = (tensor for name, tensor in saved.engine_state.items() if name.startswith("weight/"))
    if have_diverged(chain(weights, saved.teacher_state.values())):
        raise CheckpointError(
            f"{saved.folder} holds weights that have diverged: one of them is not finite or above {MAX_WEIGHT:g}; "
            "move this folder away to resume from the checkpoint before it"
        )
    for unusable, reason in refused.items():
        log.warning(
            "%s; resuming from step %d instead. The refused one was renamed to %s: check it, then delete it",
            reason, saved.step, set_aside(unusable),
        )  # fmt: skip
    return saved, saved.run_id


def set_aside_unusable_files(folder: Path) -> None:
    """Rename what stands in the place of a run's files and cannot be used, such as a damaged status.

    Everything else that a start reads is checked where it is read.
    """
    status = folder / STATUS_FILE
    unusable = [status] if os.path.lexists(status) and not read_status(folder) else []
    for path in (folder / checkpoints.CONFIG, folder / STARTED_FILE):
        unusable += [path] if os.path.lexists(path) and not path.is_file() else []
    for path in unusable:
        log.warning("%s cannot be used; it was renamed to %s", path, set_aside(path))


def require_same_shards(config: RunConfig) -> None:
    """Check that the run in `output.folder`, if there is one, was trained on the samples that `data.train` has now.

    Raises:
        ValueError: if it was trained on others, unless `data.restart_epoch` allows that.
        FileNotFoundError, ShardError, CheckpointError: if shards or checkpoints cannot be read.
    """
    saved, _ = checkpoints.read_newest(Path(config.output.folder))
    if saved is None or config.data.restart_epoch:
        return
    if saved.fingerprint["data.train"] != open_training_shards(config.data).sources_digest:
        raise ValueError(
            f"the run in {config.output.folder} was trained on other images than {config.data.train} has now; remove "
            "this folder, or choose another one for new runs"
        )


def resumed_state(saved: Checkpoint, config: RunConfig, fingerprint: dict[str, Any], num_samples: int) -> TrainState:
    """Return the training state to resume from a checkpoint, with the settings that have changed since.

    The stream of samples begins where the checkpoint says, unless settings that determine the stream have changed; then
    it begins at the epoch in which the checkpoint was written, in the new data set.

    Raises:
        CheckpointError: if settings differ that must not.
    """
    state = TrainState.from_checkpoint(saved)
    names = checkpoints.differing_settings(
        saved.fingerprint,
        fingerprint,
        may_restart=config.data.restart_epoch,
        may_extend=config.resume == "extend",
        may_adjust=config.resume == "adjust",
    )
    state.changes += [
        {"step": saved.step, "setting": name, "from": saved.fingerprint.get(name), "to": fingerprint.get(name)}
        for name in names
    ]
    if any(defines_sample_stream(name) for name in names):
        # The position in samples, counted with the sizes of the old run, gives the epoch; epochs keep their number.
        batch = saved.fingerprint["optim.global_batch_size"]
        epoch = state.start.position_of(saved.step, batch) // saved.counters["num_samples"]
        state.start = StreamStart(step=saved.step, position=epoch * num_samples)
    return state
