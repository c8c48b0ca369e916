"""The state of a run, for the scheduler or person who restarts it: `status.json` in the run's folder.

States: running -> finished | preempted | failed. The file is replaced atomically, so readers never see half of it. One
that a disk has damaged counts as none: what a run resumes from is its checkpoints.
"""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from iwm_fast.pipelines.storage.atomic import DISK_IS_FULL, DiskError, replace_file

STATUS_FILE = "status.json"


def write_status(folder: Path, state: str, *, earlier: dict[str, Any] | None = None, **entries: Any) -> None:
    """Write the state of a run atomically.

    When one rank fails, its launcher ends the others, which then report a preemption. This must not hide the cause, so
    a failure is not overwritten by a preemption unless it is the failure of an earlier start.

    Args:
        folder: the run's folder.
        state: running, finished, preempted or failed.
        earlier: what `read_status` returned when this process started.
        entries: further entries of the file, such as the step and the reason; their values must be fit for JSON.

    Raises:
        DiskError: if it cannot be written.
    """
    current = read_status(folder)
    if state == "preempted" and current.get("state") == "failed" and current != earlier:
        return
    folder.mkdir(parents=True, exist_ok=True)
    status = {
        "state": state,
        **entries,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    content = (json.dumps(status, indent=1) + "\n").encode()
    path = folder / STATUS_FILE
    try:
        replace_file(path, lambda draft: draft.write_bytes(content))
    except DiskError as error:
        if error.errno not in DISK_IS_FULL or not _overwrite(path, content):
            raise


def _overwrite(path: Path, content: bytes) -> bool:
    """Overwrite a file in place, which needs no free space, and return whether this was possible.

    A crash meanwhile leaves a file that counts as none, which is better than one that says "running" for good.
    """
    try:
        with path.open("r+b") as file:
            # Shortening the file first would free its block, which another file could take.
            file.write(content.ljust(path.stat().st_size))
    except OSError:
        return False
    return True


def read_status(folder: Path) -> dict[str, Any]:
    """Return the status that was last written to a run's folder; empty if there is none that can be read."""
    path = folder / STATUS_FILE
    try:
        status = json.loads(path.read_bytes().decode("utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return status if isinstance(status, dict) else {}
