"""Judges a lab's claims from its numbers, by a rule that does not depend on the numbers.

Differences are taken between results of the same seed, because cells with the same seed share the order of samples and
the crops. A comparison holds if the 95 % interval of the mean difference (Student, over seeds) lies above the bound,
which is zero, or minus the margin for a claim of the form "no worse than". A claim holds if all of its comparisons
hold, fails if the interval of one of them lies below the bound, and is undecided otherwise.
"""

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from iwm_fast.lab.config import Claim, Curves, ResultSelector

MAX_SEEDS = 10_000
Verdict = Literal["holds", "fails", "undecided", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds and its 95 % interval, which is infinite for a single seed."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two results, the first of which should be larger."""

    better: ResultSelector
    worse: ResultSelector
    values: tuple[tuple[float, ...], tuple[float, ...]]
    """Values of both results, for the seeds that have both."""
    difference: Interval | None
    """Mean difference; None if no seed has both results."""
    seeds_needed: int | None = None
    """Number of seeds that would decide an undecided comparison, if mean and spread stay the same."""


@dataclass(frozen=True, kw_only=True)
class ClaimVerdict:
    """A claim, its comparisons and the verdict on it."""

    claim: Claim
    comparisons: tuple[Comparison, ...]
    verdict: Verdict


def student_interval(values: Sequence[float]) -> Interval:
    """Return the mean of some values and Student's 95 % interval of it.

    Raises:
        ValueError: if `values` is empty.
    """
    if not values:
        raise ValueError("values must hold at least one number, got none")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean=mean, low=-math.inf, high=math.inf)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def seeds_needed(values: Sequence[float], bound: float = 0.0) -> int | None:
    """Return how many values with the same mean and spread have an interval that excludes the bound.

    None if the interval of `values` excludes it already, if there are fewer than two values, or for more than 10,000.
    """
    if len(values) < 2:
        return None
    distance, spread = abs(float(np.mean(values)) - bound), float(np.std(values, ddof=1))

    def excludes_bound(count: int) -> bool:
        return float(stats.t.ppf(0.975, count - 1)) * spread / math.sqrt(count) < distance

    if excludes_bound(len(values)) or not excludes_bound(MAX_SEEDS):
        return None
    # The interval shrinks with every further value.
    return bisect_left(range(MAX_SEEDS), True, lo=len(values), key=excludes_bound)


def values_by_seed(selector: ResultSelector, rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return the selected value for each seed, from a lab's rows (cell, seed, result, subject, metric, value, ...)."""
    return {row["seed"]: row["value"] for row in rows if _matches(row, selector)}


def num_tuned_of(selector: ResultSelector, rows: Sequence[Mapping[str, Any]]) -> int:
    """Return the number of parameters that were trained for a result; 0 if it was not measured."""
    return max((row["num_tuned"] for row in rows if _matches(row, selector)), default=0)


def _matches(row: Mapping[str, Any], selector: ResultSelector) -> bool:
    return all(row[key] == value for key, value in asdict(selector).items())


def judge(claim: Claim, values: Callable[[ResultSelector], dict[int, float]]) -> ClaimVerdict:
    """Judge a claim by its comparisons; `values` returns a result's value for each seed that has it."""
    comparisons = tuple(_compare(better, worse, values, -claim.margin) for better, worse in claim.compare)
    intervals = [comparison.difference for comparison in comparisons]
    measured = [interval for interval in intervals if interval is not None]
    if len(measured) < len(intervals):
        verdict: Verdict = "not measured"
    elif all(interval.low > -claim.margin for interval in measured):
        verdict = "holds"
    else:
        verdict = "fails" if any(interval.high < -claim.margin for interval in measured) else "undecided"
    return ClaimVerdict(claim=claim, comparisons=comparisons, verdict=verdict)


def _compare(
    better: ResultSelector, worse: ResultSelector, values: Callable[[ResultSelector], dict[int, float]], bound: float
) -> Comparison:
    better_values, worse_values = values(better), values(worse)
    seeds = sorted(better_values.keys() & worse_values.keys())
    differences = [better_values[seed] - worse_values[seed] for seed in seeds]
    return Comparison(
        better=better,
        worse=worse,
        values=(tuple(better_values[seed] for seed in seeds), tuple(worse_values[seed] for seed in seeds)),
        difference=student_interval(differences) if differences else None,
        seeds_needed=seeds_needed(differences, bound),
    )


def curve_points(
    curves: Curves, values: Callable[[ResultSelector], dict[int, float]]
) -> dict[str, list[tuple[float, Interval]]]:
    """Return the points of each line that were measured, as x and the interval over seeds; no line without a point.

    With a single seed, the interval is the value itself.
    """
    lines = {}
    for name, selectors in curves.lines.items():
        points = []
        for x, selector in zip(curves.x, selectors, strict=True):
            by_seed = list(values(selector).values())
            if len(by_seed) == 1:
                points.append((x, Interval(mean=by_seed[0], low=by_seed[0], high=by_seed[0])))
            elif by_seed:
                points.append((x, student_interval(by_seed)))
        if points:
            lines[name] = points
    return lines
