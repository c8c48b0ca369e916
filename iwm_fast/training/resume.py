"""Where a run goes on: the newest whole checkpoint, and in which stream of samples."""

import json
import logging
import uuid
from pathlib import Path
from typing import Any

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.checkpoints.commit import set_aside
from iwm_fast.config.fingerprint import is_of_the_stream
from iwm_fast.config.run import RunConfig
from iwm_fast.engines.base import Engine
from iwm_fast.pipelines.sampling.batch_plan import StreamStart
from iwm_fast.runtime import distributed
from iwm_fast.training.teacher import Teacher
from iwm_fast.training.train_state import Progress

log = logging.getLogger("iwm_fast")


def resume(
    config: RunConfig, fingerprint: dict[str, Any], num_samples: int, *, engine: Engine, teacher: Teacher
) -> Progress:
    """Load the newest whole checkpoint if there is one and the run may continue it; collective.

    Raises:
        ValueError: if the folder holds a run and resume is never.
        CheckpointError: if no checkpoint is whole, or the newest whole one belongs to other settings.
    """
    saved: Checkpoint | None = None

    def decide() -> tuple[Path | None, str]:
        nonlocal saved
        saved, run_id = find_start(config, fingerprint)
        return saved and saved.folder, run_id

    folder, run_id = distributed.on_rank_zero(decide)
    if folder is None:
        return Progress(run_id=run_id)
    # rank 0 has it already
    saved = saved or checkpoints.read(folder)
    checkpoints.restore(saved, engine)
    teacher.load_state_dict(saved.teacher_state)
    log.info("going on from %s", folder)
    start = stream_start(saved, config, fingerprint, num_samples)
    return Progress(step=saved.step, applied_steps=saved.applied_steps, start=start, run_id=run_id)


def find_start(config: RunConfig, fingerprint: dict[str, Any]) -> tuple[Checkpoint | None, str]:
    """Return the checkpoint to go on from, None to start anew, and the run's id; on one rank.

    What is damaged is moved aside, so that its step can be written again.

    Raises:
        ValueError: if the folder holds a run and resume is never.
        CheckpointError: if no checkpoint is whole, or the newest whole one belongs to other settings.
    """
    folder = Path(config.output.folder)
    is_used = bool(checkpoints.step_folders(folder)) or (folder / "metrics.jsonl").exists()
    if is_used and config.resume == "never":
        raise ValueError(
            f"output.folder = {config.output.folder!r} already holds a run; "
            "name another folder, or say resume=auto to go on with it"
        )
    saved, refused = checkpoints.read_newest(folder)
    if saved is None:
        return None, earlier_run_id(folder) or uuid.uuid4().hex[:12]
    # before anything is moved, and read here for its errors: one message from rank 0 instead of one from each
    _differing_settings(saved, config, fingerprint)
    for damaged, reason in refused.items():
        log.warning(
            "%s; going on from step %d instead. It is %s now: look after the disk, and delete it when it is of no use",
            reason, saved.step, set_aside(damaged),
        )  # fmt: skip
    return saved, saved.run_id


def earlier_run_id(folder: Path) -> str | None:
    """Return the id of the run that was started last in a folder, None if there is none."""
    path = folder / "started.jsonl"
    for line in reversed(path.read_text(encoding="utf-8").splitlines() if path.is_file() else []):
        try:
            return json.loads(line).get("run_id")
        # cut off by a crash
        except ValueError:
            continue
    return None


def stream_start(saved: Checkpoint, config: RunConfig, fingerprint: dict[str, Any], num_samples: int) -> StreamStart:
    """Return where the stream of samples begins: as the checkpoint has it, or with the epoch it stands in begun anew.

    Raises:
        CheckpointError: if settings differ and must not.
    """
    start = StreamStart(**saved.counters["stream"])
    changed = _differing_settings(saved, config, fingerprint)
    of_the_stream = [name for name in changed if is_of_the_stream(name)]
    if of_the_stream != changed:
        log.info("schedules are laid out over %g epochs", config.optim.epochs)
    if not of_the_stream:
        return start
    batch = saved.fingerprint["optim.global_batch_size"]
    position = start.position + (saved.step - start.step) * batch
    epoch = position // saved.counters["num_samples"]
    log.info("epoch %d begins anew, because of other settings: %s", epoch, ", ".join(of_the_stream))
    return StreamStart(step=saved.step, position=epoch * num_samples)


def _differing_settings(saved: Checkpoint, config: RunConfig, fingerprint: dict[str, Any]) -> list[str]:
    return checkpoints.differing_settings(
        saved.fingerprint,
        fingerprint,
        may_restart=config.data.restart_epoch,
        may_extend=config.resume == "extend",
    )
