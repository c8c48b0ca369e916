"""Correlation of MRR with accuracy over the runs of a lab: does a better world model make better features?

A pair of numbers per run, which is a cell with a seed: Pearson's coefficient and its 95 % interval by Fisher's
transformation. The interval takes runs as independent, although those of one cell differ in their seed only.

Source: IWM, which reports coefficients without intervals.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

_MRR = ("jitter", "mrr")
_TASKS = ("knn", "linear", "attentive", "finetune", "segment")
_METRICS = ("accuracy", "mean_iou")
# By task and subject.
_PAPER = {("linear", "encoder"): -0.85, ("attentive", "encoder"): -0.37, ("finetune", "predictor"): 0.93}
MIN_RUNS = 4
"""Smallest number of runs: Fisher's standard error is 1 / sqrt(runs - 3)."""


@dataclass(frozen=True, kw_only=True)
class Correlation:
    """Correlation of the MRR of jitter with another result, over all runs that have both."""

    mrr: str
    """Name of the result with the MRR: mrr_default, mrr_strong, ..."""
    result: str
    subject: str
    metric: str
    coefficient: float
    """Pearson's coefficient."""
    low: float
    """Lower end of Fisher's 95 % interval."""
    high: float
    """Upper end of the interval."""
    num_runs: int
    num_cells: int
    paper: float | None
    """Coefficient in the paper; None if it has none."""
    points: tuple[tuple[float, float], ...]
    """MRR and the other result of each run."""

    def __str__(self) -> str:
        return f"{self.result} {self.subject} {self.metric}"


def correlate(rows: Sequence[Mapping[str, Any]]) -> list[Correlation]:
    """Return the correlations over a lab's rows (cell, seed, result, subject, metric, value, ...), in their order.

    Pairs with fewer than 4 runs, without any variation, or of different checkpoints are left out.
    """
    results: dict[tuple[str, str, str], dict[tuple[str, int], float]] = {}
    for row in filter(is_correlated, rows):
        values = results.setdefault((row["result"], row["subject"], row["metric"]), {})
        values[row["cell"], row["seed"]] = row["value"]
    mrrs = {name: values for (name, *rest), values in results.items() if tuple(rest) == _MRR}
    pairs = (
        _correlate(mrr, mrr_values, key, values)
        for mrr, mrr_values in mrrs.items()
        for key, values in results.items()
        if key[1:] != _MRR and _checkpoint(key[0]) == _checkpoint(mrr)
    )
    return [correlation for correlation in pairs if correlation is not None]


def is_correlated(row: Mapping[str, Any]) -> bool:
    """Return whether a row of a lab is an MRR of jitter or an accuracy that `correlate` compares with it."""
    is_mrr = (row["subject"], row["metric"]) == _MRR
    return is_mrr or (_task(row["result"]) in _TASKS and row["metric"] in _METRICS)


def _task(result: str) -> str:
    return re.split("[_-]", result)[0]


def _checkpoint(result: str) -> str:
    """Return the step of a result's checkpoint; empty for the last checkpoint, which no name contains."""
    return result.partition("-step-")[2]


def _correlate(
    mrr: str,
    mrr_values: Mapping[tuple[str, int], float],
    key: tuple[str, str, str],
    values: Mapping[tuple[str, int], float],
) -> Correlation | None:
    runs = sorted(mrr_values.keys() & values.keys())
    points = tuple((mrr_values[run], values[run]) for run in runs)
    if len(runs) < MIN_RUNS or any(len(set(axis)) == 1 for axis in zip(*points, strict=True)):
        return None
    pearson: Any = stats.pearsonr(*zip(*points, strict=True))
    interval = pearson.confidence_interval(0.95)
    result, subject, metric = key
    # The paper's accuracies are those of image classes.
    has_paper = metric == "accuracy" and "_json." not in result and not _checkpoint(result)
    return Correlation(
        mrr=mrr,
        result=result,
        subject=subject,
        metric=metric,
        coefficient=float(pearson.statistic),
        low=float(interval.low),
        high=float(interval.high),
        num_runs=len(runs),
        num_cells=len({cell for cell, _ in runs}),
        paper=_PAPER.get((_task(result), subject)) if has_paper else None,
        points=points,
    )
