"""Results of evaluations: metrics with their controls and intervals, for the terminal and in the run's folder.

<run>/evaluations/<name>.json      settings, rows and details
<run>/evaluations/<name>.parquet   the rows alone, for comparing many runs
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
from iwm_fast.runtime.provenance import current_commit

NUM_RESAMPLES = 2000
"""Bootstrap resamples of a 95 % interval."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured number, with its interval and what to compare it with."""

    subject: str
    """What was measured: a family of transformations, a finetuned variant, a task, an entry of the action, ..."""
    metric: str
    """Name of the metric: mrr, recall_at_1, accuracy, mean_iou, error, ..."""
    value: float
    low: float | None = None
    """Lower end of the 95 % bootstrap interval over images; None if none was computed."""
    high: float | None = None
    """Upper end of the interval."""
    control: float | None = None
    """The same metric of a baseline."""
    control_name: str = ""
    """Name of the baseline: untrained predictor, random initialisation, ..."""
    chance: float | None = None
    """Expected value of guessing."""
    num_tuned: int = 0
    """Number of parameters trained for this metric; 0 if nothing is trained."""
    num_samples: int = 0
    """Number of images the metric was measured on."""
    images_per_s: float | None = None
    """Training speed, summed over all ranks; None if nothing is trained."""
    time_s: float | None = None
    """Duration in seconds, without the extraction of cached features."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of one evaluation."""

    task: str
    """Name of the evaluation: mrr, knn, linear, ..."""
    name: str
    """Stem of the files: the task, followed by what distinguishes two evaluations of it, such as the label."""
    rows: tuple[Row, ...]
    step: int
    """Optimiser steps of the evaluated checkpoint."""
    seed: int
    settings: dict[str, Any]
    """Settings of the evaluation."""
    details: dict[str, Any] = field(default_factory=dict)
    """Further values that are specific to the task."""

    def value(self, subject: str, metric: str) -> float:
        """Return the value of a metric of a subject.

        Raises:
            KeyError: if there is no such row.
        """
        return self.row(subject, metric).value

    def row(self, subject: str, metric: str) -> Row:
        """Return the row of a metric of a subject.

        Raises:
            KeyError: if there is no such row.
        """
        for row in self.rows:
            if (row.subject, row.metric) == (subject, metric):
                return row
        raise KeyError(f"{self.name} has no row for {subject!r}, {metric!r}")


def name_with_choices(name: str, settings: Any, step: int) -> str:
    """Return the name of a result, which ends with the image size, the layers and the step that were chosen, if any.

    So results of other sizes, layers and checkpoints do not replace those of the defaults.
    """
    size, layers = getattr(settings, "size", None), getattr(settings, "layers", 1)
    if size:
        name += f"_size{size}"
    if layers > 1:
        name += f"_layers{layers}"
    return f"{name}-step-{step:08d}" if settings.checkpoint else name


def save_result(run: str | Path, result: Result) -> Path:
    """Write a result into a run's folder, replacing an earlier one of that name, and return its JSON file."""
    path = Path(run) / "evaluations" / f"{result.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    tree = asdict(result) | {"commit": current_commit()}
    replace_file(path, lambda draft: draft.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8"))
    shared = {"task": result.task, "name": result.name, "step": result.step, "seed": result.seed}
    result_table = pa.Table.from_pylist([shared | asdict(row) for row in result.rows], schema=_SCHEMA)
    replace_file(path.with_suffix(".parquet"), lambda draft: parquet.write_table(result_table, draft))
    return path


# The types are fixed, so that tables of several runs can be concatenated even if a column has no value in one of them.
_ARROW_TYPES = {str: pa.string(), int: pa.int64(), float: pa.float64()}
_SCHEMA = pa.schema(
    [("task", pa.string()), ("name", pa.string()), ("step", pa.int64()), ("seed", pa.int64())]
    + [(column.name, _ARROW_TYPES.get(column.type, pa.float64())) for column in fields(Row)]  # type: ignore[call-overload]
)


def read_result(path: Path) -> Result:
    """Read a result from its JSON file.

    Raises:
        FileNotFoundError: if the task has not been evaluated.
        ValueError: if an older version of iwm-fast wrote the file.
    """
    if not path.is_file():
        task = path.stem.partition("_")[0]
        command = task if task in ("decode", "plan") else f"evaluate {task}"
        raise FileNotFoundError(f"{path} does not exist; run `iwm {command}` first")
    tree = json.loads(path.read_text(encoding="utf-8"))
    if "rows" not in tree:
        raise ValueError(f"{path} was written by an older iwm-fast, without rows; delete it or evaluate again")
    tree.pop("commit")
    return Result(**tree | {"rows": tuple(Row(**row) for row in tree["rows"])})


def result_table(result: Result) -> Table:
    """Return a result as a table for the terminal, without the columns that are empty in all rows."""
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
    rich_table = Table(*filled, title=f"{result.name}, step {result.step}, seed {result.seed}")
    for row in result.rows:
        rich_table.add_row(*(cell(row) for cell in filled.values()))
    return rich_table


def bootstrap(values: Float[np.ndarray, "images"], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a mean over images, by resampling the images with replacement."""
    generator = np.random.default_rng(seed)
    means = np.empty(NUM_RESAMPLES)
    # As many resamples at a time as fit into a cache.
    for part in np.array_split(means, max(1, NUM_RESAMPLES * len(values) >> 16)):
        part[:] = values[generator.integers(0, len(values), (len(part), len(values)))].mean(axis=1)
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
    **row_fields: Any,
) -> Row:
    """Return a row with the mean of a metric over images and its 95 % interval.

    Args:
        subject: what was measured.
        metric: name of the metric.
        values: the metric of each image; booleans count as 0 and 1.
        seed: seed of the bootstrap.
        control: the metric of each image for a baseline; None if there is no baseline.
        control_name: name of the baseline.
        row_fields: further fields of the row.
    """
    low, high = bootstrap(values.astype(np.float64), seed)
    if control is not None:
        row_fields |= {"control": float(control.mean()), "control_name": control_name}
    mean, num_samples = float(values.mean()), len(values)
    return Row(subject=subject, metric=metric, value=mean, low=low, high=high, num_samples=num_samples, **row_fields)


def accuracy_gain(
    correct: Shaped[np.ndarray, "images"], control: Shaped[np.ndarray, "images"], seed: int
) -> dict[str, float]:
    """Return the accuracy of `correct` minus that of `control` on the same images, with its 95 % interval."""
    # Resampling the differences of paired images gives a narrower interval than comparing two independent accuracies.
    gain = correct.astype(np.float64) - control
    low, high = bootstrap(gain, seed)
    return {"accuracy": float(gain.mean()), "low": low, "high": high}
