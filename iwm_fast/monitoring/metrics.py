"""Numbers of a run: `metrics.jsonl` is the record of truth, TensorBoard shows the same."""

import json
import math
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from iwm_fast.pipelines.storage.atomic import replace_file


class MetricWriter:
    """Appends one row per log step; rows at or behind the step a run resumes from are dropped first."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._path = folder / "metrics.jsonl"
        kept = [row for row in read_metrics(folder) if row["step"] <= first_step]
        text = "".join(json.dumps(row) + "\n" for row in kept)
        replace_file(self._path, lambda draft: draft.write_text(text, encoding="utf-8"))
        self._file = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one row; `step` is the number of steps done."""
        # JSON knows no infinity, which is the gradient norm of a skipped step
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish both files."""
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return a run's rows; a last line cut off by a crash is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [json.loads(line) for line in lines]
