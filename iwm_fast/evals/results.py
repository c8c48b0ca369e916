"""What an evaluation has measured: rows of numbers beside their controls, on the terminal and in the run's folder.

<run>/evaluations/<name>.json      settings, rows, and whatever else belongs to the task
<run>/evaluations/<name>.parquet   the rows alone, for whoever compares many runs
"""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Shaped
from pyarrow import parquet
from rich.table import Table

from iwm_fast.pipelines.storage.atomic import replace_file
from iwm_fast.runtime.provenance import commit

NUM_RESAMPLES = 2000


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number and what it has to be compared with."""

    subject: str
    """What was measured: a family of transformations, an arm, a task, a parameter."""
    metric: str
    """mrr, recall_at_1, accuracy, mean_iou, error, ..."""
    value: float
    low: float | None = None
    """Lower end of the 95 % interval over images, where one was computed."""
    high: float | None = None
    control: float | None = None
    """The same number of what it should beat."""
    control_name: str = ""
    """What that is: untrained predictor, random initialisation, ..."""
    chance: float | None = None
    """What a guess would give."""
    num_tuned: int = 0
    """Parameters that were trained for this number; 0 for what needs no training."""
    num_samples: int = 0
    """Images it was measured on."""
    images_per_s: float | None = None
    """Training speed over all ranks, of what was trained."""
    time_s: float | None = None
    """What it took, features from the cache not counted."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of one evaluation."""

    task: str
    """mrr, knn, linear, ..."""
    name: str
    """Of the files; the task, and what tells two evaluations of that task apart."""
    rows: tuple[Row, ...]
    step: int
    """Optimiser steps of the evaluated checkpoint."""
    seed: int
    settings: dict[str, Any]
    """The task's settings."""
    details: dict[str, Any] = field(default_factory=dict)
    """What else a reader of this task wants to know."""

    def value(self, subject: str, metric: str) -> float:
        """Return one number.

        Raises:
            KeyError: if there is no such row.
        """
        return self.row(subject, metric).value

    def row(self, subject: str, metric: str) -> Row:
        """Return one row.

        Raises:
            KeyError: if there is none.
        """
        for row in self.rows:
            if (row.subject, row.metric) == (subject, metric):
                return row
        raise KeyError(f"{self.name} has no row {subject!r}, {metric!r}")


def name_with_step(name: str, checkpoint: str, step: int) -> str:
    """Return the name of a result, which ends with the step if a checkpoint was chosen instead of the newest.

    So results of other checkpoints do not replace those of the newest.
    """
    return f"{name}-step-{step:08d}" if checkpoint else name


def save_result(run: str | Path, result: Result) -> Path:
    """Write a result into a run's folder and return the JSON file; that of an earlier checkpoint is replaced."""
    path = Path(run) / "evaluations" / f"{result.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = asdict(result) | {"commit": commit()}
    replace_file(path, lambda draft: draft.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8"))
    shared = {"task": result.task, "name": result.name, "step": result.step, "seed": result.seed}
    table = pa.Table.from_pylist([shared | asdict(row) for row in result.rows], schema=_SCHEMA)
    replace_file(path.with_suffix(".parquet"), lambda draft: parquet.write_table(table, draft))
    return path


_KINDS = {str: pa.string(), int: pa.int64(), float: pa.float64()}
_SCHEMA = pa.schema(
    [("task", pa.string()), ("name", pa.string()), ("step", pa.int64()), ("seed", pa.int64())]
    + [(one.name, _KINDS.get(one.type, pa.float64())) for one in fields(Row)]  # type: ignore[call-overload]
)


def read_result(path: Path) -> Result:
    """Read what `save_result` wrote.

    Raises:
        FileNotFoundError: if the task has not been evaluated.
        ValueError: if it is of an older version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; run `iwm evaluate {path.stem.partition('_')[0]}` first")
    tree = json.loads(path.read_text(encoding="utf-8"))
    if "rows" not in tree:
        raise ValueError(f"{path} was written by an older iwm-fast, without rows; delete it, or evaluate again")
    tree.pop("commit")
    return Result(**tree | {"rows": tuple(Row(**row) for row in tree["rows"])})


def table(result: Result) -> Table:
    """Lay a result out for a terminal; columns in which no row has anything are left out."""
    columns = {
        "": lambda row: row.subject,
        "measured": lambda row: row.metric,
        "value": lambda row: f"{row.value:.4f}",
        "95 % interval": lambda row: "" if row.low is None else f"{row.low:.4f} .. {row.high:.4f}",
        "control": lambda row: "" if row.control is None else f"{row.control:.4f} {row.control_name}",
        "chance": lambda row: "" if row.chance is None else f"{row.chance:.4f}",
        "tuned": lambda row: f"{row.num_tuned:,}" if row.num_tuned else "",
        "images/s": lambda row: f"{row.images_per_s:.0f}" if row.images_per_s else "",
        "s": lambda row: "" if row.time_s is None else f"{row.time_s:.1f}",
        "images": lambda row: f"{row.num_samples:,}" if row.num_samples else "",
    }
    filled = {name: cell for name, cell in columns.items() if any(cell(row) for row in result.rows)}
    laid_out = Table(*filled, title=f"{result.name}, step {result.step}, seed {result.seed}")
    for row in result.rows:
        laid_out.add_row(*(cell(row) for cell in filled.values()))
    return laid_out


def bootstrap(values: Float[np.ndarray, "images"], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a mean over images, by drawing the images anew with replacement."""
    generator = np.random.default_rng(seed)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def mean_row(
    subject: str,
    metric: str,
    values: Shaped[np.ndarray, "images"],
    seed: int,
    *,
    control: Shaped[np.ndarray, "..."] | None = None,
    control_name: str = "",
    **more: Any,
) -> Row:
    """Return the mean of a number over images, with its interval.

    Args:
        subject: what was measured.
        metric: name of the number.
        values: of each image; booleans count as 0 and 1.
        seed: of the interval's resampling.
        control: the same of what it is compared with; None if there is nothing.
        control_name: what that is.
        more: further fields of the row.
    """
    low, high = bootstrap(values.astype(np.float64), seed)
    compared = {} if control is None else {"control": float(control.mean()), "control_name": control_name}
    return Row(
        subject=subject,
        metric=metric,
        value=float(values.mean()),
        low=low,
        high=high,
        num_samples=len(values),
        **compared,
        **more,
    )


def accuracy_gain(
    correct: Shaped[np.ndarray, "images"], control: Shaped[np.ndarray, "images"], seed: int
) -> dict[str, float]:
    """Return how much more accurate one is than the other, with the interval of the difference.

    Both are of the same images, so that it varies less than the difference of two independent accuracies.
    """
    gain = correct.astype(np.float64) - control
    low, high = bootstrap(gain, seed)
    return {"accuracy": float(gain.mean()), "low": low, "high": high}
