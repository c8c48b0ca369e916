"""The state of a run, for the scheduler or person who restarts it: `status.json` in the run's folder.

States: running -> finished | preempted | failed. The file is replaced atomically, so readers never see half of it.
"""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from iwm_fast.pipelines.storage.atomic import replace_file

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
    text = json.dumps(status, indent=1) + "\n"
    replace_file(folder / STATUS_FILE, lambda draft: draft.write_text(text, encoding="utf-8"))


def read_status(folder: Path) -> dict[str, Any]:
    """Return the status that was last written to a run's folder; empty if there is none."""
    path = folder / STATUS_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
