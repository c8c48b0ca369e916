"""How a run stands, for whoever starts it again: `status.json` in its folder, written whole or not at all.

running -> finished | preempted | failed
"""

import json
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from iwm_fast.pipelines.storage.atomic import replace_file

STATUS = "status.json"


def write_status(folder: Path, state: str, *, earlier: dict[str, Any] | None = None, **more: Any) -> None:
    """Say how a run stands, for whoever starts it again; whole or not at all.

    A failure is not overwritten by the preemption that it brings upon the other ranks.

    Args:
        folder: the run's.
        state: see above.
        earlier: what `read_status` returned when this start began; such a failure is an earlier start's.
        more: whatever else is to be said.
    """
    found = read_status(folder)
    if state == "preempted" and found.get("state") == "failed" and found != earlier:
        return
    folder.mkdir(parents=True, exist_ok=True)
    row = {
        "state": state,
        **more,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    text = json.dumps(row, indent=1) + "\n"
    replace_file(folder / STATUS, lambda draft: draft.write_text(text, encoding="utf-8"))


def read_status(folder: Path) -> dict[str, Any]:
    """Return what was last written; empty if nothing was."""
    path = folder / STATUS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
