"""Reads the metrics of a run, without the packages that write them."""

import json
import logging
from pathlib import Path
from typing import Any

from iwm_fast.pipelines.storage.atomic import replace_file, set_aside
from iwm_fast.runtime.json_lines import read_lines

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run; damaged lines are left out, and so is a last line that is still being written."""
    return read_rows(folder / METRICS_FILE)[0]


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrite a file of one JSON object per line without the rows of steps after `step`, which a run repeats.

    Damaged lines are dropped, too; the file that had them is kept under another name.

    Raises:
        DiskError: if the file cannot be written.
    """
    rows, problem = read_rows(path)
    if problem:
        log.warning("%s; they are left out, and the file is kept as %s", problem, set_aside(path))
    text = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= step)
    replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def read_rows(path: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a file, and what is wrong with it, as a sentence that names it; empty if nothing is."""
    try:
        objects, damaged = read_lines(path)
    except OSError as error:
        return [], f"{path} cannot be read ({error.strerror})"
    rows = [row for row in objects if isinstance(row.get("step"), int)]
    if len(rows) < len(objects):
        return rows, f"{path} has lines without a step"
    numbers = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
    return rows, f"{path} has damaged lines: {numbers}" if damaged else ""
