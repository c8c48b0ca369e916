"""Reads the metrics of a run, without the packages that write them."""

import json
from pathlib import Path
from typing import Any

from iwm_fast.pipelines.storage.atomic import replace_file


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run; an incomplete last line, left by a crash, is ignored."""
    return _read_rows(folder / "metrics.jsonl")


def drop_rows_after(path: Path, step: int) -> None:
    """Rewrite a file of one JSON object per line without the rows of steps after `step`, which a run repeats."""
    if path.is_file():
        text = "".join(json.dumps(row) + "\n" for row in _read_rows(path) if row["step"] <= step)
        replace_file(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def _read_rows(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    # A complete last line ends with a newline, so the last piece is empty or incomplete.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
