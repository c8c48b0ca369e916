"""Reads the metrics of a run, without the packages that write them."""

import logging
from pathlib import Path
from typing import Any

from iwm_fast.runtime.json_lines import read_lines

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run; damaged lines are left out, and so is a last line that is still being written."""
    return read_rows(folder)[0]


def read_rows(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Return the rows of a run, and what is wrong with its file, as a sentence that names it; empty if nothing is."""
    path = folder / METRICS_FILE
    try:
        objects, damaged = read_lines(path)
    except OSError as error:
        return [], f"{path} cannot be read ({error.strerror})"
    rows = [row for row in objects if isinstance(row.get("step"), int)]
    if len(rows) < len(objects):
        return rows, f"{path} has lines without a step"
    numbers = ", ".join(map(str, damaged[:10])) + (", ..." if len(damaged) > 10 else "")
    return rows, f"{path} has damaged lines: {numbers}" if damaged else ""
