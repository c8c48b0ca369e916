"""Reads the metrics of a run, without the packages that write them."""

import json
from pathlib import Path
from typing import Any


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run; an incomplete last line, left by a crash, is ignored."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    # A complete last line ends with a newline, so the last piece is empty or incomplete.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
