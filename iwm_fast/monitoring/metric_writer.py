"""Writes the metrics of a run: `metrics.jsonl` is the authoritative record, TensorBoard shows the same values."""

import json
import math
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from iwm_fast.monitoring.metrics import drop_rows_after


class MetricWriter:
    """Appends one row of metrics per log step."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open the files in `folder`, and drop rows after `first_step`, the step that the run resumes from."""
        path = folder / "metrics.jsonl"
        drop_rows_after(path, first_step)
        self._file = path.open("a", encoding="utf-8")
        # Purging hides the dropped rows in TensorBoard, whose files cannot be rewritten.
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one row; `step` is the number of completed steps."""
        # The gradient norm of a skipped step is infinite or NaN, which JSON cannot represent.
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        # Flushed, so that a crash loses no row and users can follow the file.
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Close metrics.jsonl and the TensorBoard file."""
        self._file.close()
        self._board.close()
