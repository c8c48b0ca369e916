"""Where a run goes on: the newest checkpoint, and in which stream of samples."""

import logging
from pathlib import Path
from typing import Any

from iwm_fast import checkpoint as checkpoints
from iwm_fast import distributed
from iwm_fast.checkpoint import Checkpoint
from iwm_fast.config import RunConfig
from iwm_fast.engine import Engine
from iwm_fast.logbook import Progress
from iwm_fast.teacher import Teacher
from pipelines.plan import StreamStart

log = logging.getLogger("iwm_fast")


def resume(
    config: RunConfig, fingerprint: dict[str, Any], num_samples: int, *, engine: Engine, teacher: Teacher
) -> Progress:
    """Load the newest checkpoint if there is one and the run may continue it; collective.

    Raises:
        ValueError: if the folder holds a run and output.resume is never.
        CheckpointError: if the checkpoint is damaged or belongs to other settings.
    """
    newest = distributed.on_rank_zero(lambda: find_start(config, fingerprint))
    if newest is None:
        return Progress()
    saved = checkpoints.read(newest)
    checkpoints.restore(saved, engine)
    teacher.load_state_dict(saved.teacher_state)
    log.info("going on from %s", newest)
    start = stream_start(saved, config, fingerprint, num_samples)
    return Progress(step=saved.step, applied_steps=saved.applied_steps, start=start)


def find_start(config: RunConfig, fingerprint: dict[str, Any]) -> Path | None:
    """Return the checkpoint to go on from, None to start anew.

    Raises:
        ValueError: if the folder holds a run and output.resume is never.
        CheckpointError: if the checkpoint is damaged or belongs to other settings.
    """
    folder = Path(config.output.folder)
    newest = checkpoints.newest(folder)
    is_used = newest is not None or (folder / "metrics.jsonl").exists()
    if is_used and config.output.resume == "never":
        raise ValueError(
            f"output.folder = {config.output.folder!r} already holds a run; "
            "name another folder, or say output.resume=auto to go on with it"
        )
    if newest is not None:
        # read here for its errors: one message from rank 0 instead of one from each
        saved = checkpoints.read(newest)
        checkpoints.differing_settings(saved.fingerprint, fingerprint, may_restart=config.data.restart_epoch)
    return newest


def stream_start(saved: Checkpoint, config: RunConfig, fingerprint: dict[str, Any], num_samples: int) -> StreamStart:
    """Return where the stream of samples begins: as the checkpoint has it, or with the epoch it stands in begun anew.

    Raises:
        CheckpointError: if settings differ and the epoch may not begin anew.
    """
    start = StreamStart(**saved.counters["stream"])
    changed = checkpoints.differing_settings(saved.fingerprint, fingerprint, may_restart=config.data.restart_epoch)
    if not changed:
        return start
    batch = saved.fingerprint["optim.global_batch_size"]
    position = start.position + (saved.step - start.step) * batch
    epoch = position // saved.counters["num_samples"]
    log.info("epoch %d begins anew, because of other settings: %s", epoch, ", ".join(changed))
    return StreamStart(step=saved.step, position=epoch * num_samples)
