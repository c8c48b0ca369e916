"""Where training continues: the newest complete checkpoint, and in which stream of samples."""

import json
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.config.fingerprint import defines_sample_stream
from iwm_fast.config.run import RunConfig
from iwm_fast.pipelines.sampling.batch_plan import StreamStart
from iwm_fast.pipelines.storage.atomic import set_aside
from iwm_fast.runtime import distributed

log = logging.getLogger(__name__)


def find_start(config: RunConfig, require_same: Callable[[Checkpoint], Any]) -> tuple[Checkpoint | None, str]:
    """Return the checkpoint to continue from, None to start from scratch, and the run's id; collective.

    Damaged checkpoints after it are moved aside, so that their steps can be written again.

    Args:
        config: settings; `output.folder` is searched.
        require_same: called with the checkpoint on rank 0; raises CheckpointError if it must not be continued.

    Raises:
        ValueError: if the folder holds a run and resume is never.
        CheckpointError: if no checkpoint is complete, or the newest complete one must not be continued.
    """
    found: tuple[Checkpoint | None, str] | None = distributed.rank_zero_only(
        lambda: _find_start_alone(config, require_same)
    )
    # an object of gigabytes is read again, not sent
    folder, run_id = distributed.broadcast_from_rank_zero(lambda: _address(found))
    if folder is None:
        return None, run_id
    saved = found[0] if found else None
    return saved or checkpoints.read(folder), run_id


def _address(found: tuple[Checkpoint | None, str] | None) -> tuple[Path | None, str]:
    saved, run_id = found or (None, "")
    return (saved.folder if saved else None), run_id


def _find_start_alone(config: RunConfig, require_same: Callable[[Checkpoint], Any]) -> tuple[Checkpoint | None, str]:
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
    # before anything is moved
    require_same(saved)
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
    """Return where the stream of samples begins: as the checkpoint has it, or with its current epoch restarted.

    Raises:
        CheckpointError: if settings differ and must not.
    """
    start = StreamStart(**saved.counters["stream"])
    changed = checkpoints.differing_settings(
        saved.fingerprint,
        fingerprint,
        may_restart=config.data.restart_epoch,
        may_extend=config.resume == "extend",
    )
    of_the_stream = [name for name in changed if defines_sample_stream(name)]
    if not of_the_stream:
        return start
    batch = saved.fingerprint["optim.global_batch_size"]
    position = start.position + (saved.step - start.step) * batch
    epoch = position // saved.counters["num_samples"]
    return StreamStart(step=saved.step, position=epoch * num_samples)
