"""Whether a lab's numbers bear out its claims, by a rule that was fixed before: intervals of differences.

A comparison holds if the 95 % interval of the mean difference lies above zero, or above minus the margin of a claim
that says "no worse than"; differences are taken seed by seed,
because cells of one seed share their order of samples and their crops, and the interval is Student's over seeds. A
claim holds if all of its comparisons do, fails if one of them lies below that bound, and is undecided otherwise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from iwm_fast.lab.config import Claim, Number

Verdict = Literal["holds", "fails", "undecided", "not measured"]


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds and its 95 % interval; infinite with one seed."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Two numbers of which the first should be the larger."""

    better: Number
    worse: Number
    values: tuple[tuple[float, ...], tuple[float, ...]]
    """Of each over the seeds that have both."""
    difference: Interval | None
    """None if no seed has both."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a lab says of a claim."""

    claim: Claim
    comparisons: tuple[Comparison, ...]
    verdict: Verdict


def interval(values: Sequence[float]) -> Interval:
    """Return mean and Student's 95 % interval of some numbers.

    Raises:
        ValueError: if there are none.
    """
    if not values:
        raise ValueError("values must hold at least one number, got none")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean=mean, low=-math.inf, high=math.inf)
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean=mean, low=mean - half, high=mean + half)


def values_of(number: Number, rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Return a number by seed out of a lab's rows (cell, seed, result, subject, metric, value, ...)."""
    return {row["seed"]: row["value"] for row in rows if _is_of(row, number)}


def tuned_for(number: Number, rows: Sequence[Mapping[str, Any]]) -> int:
    """Return how many parameters were trained for a number; 0 if it was not measured."""
    return max((row["num_tuned"] for row in rows if _is_of(row, number)), default=0)


def _is_of(row: Mapping[str, Any], number: Number) -> bool:
    return all(row[part] == name for part, name in asdict(number).items())


def judge(claim: Claim, values: Callable[[Number], dict[int, float]]) -> Outcome:
    """Compare what a claim compares.

    Args:
        claim: what should hold.
        values: returns a number by seed, for the seeds that have it.
    """
    comparisons = tuple(_compare(better, worse, values) for better, worse in claim.compare)
    differences = [one.difference for one in comparisons]
    known = [one for one in differences if one is not None]
    if len(known) < len(differences):
        verdict: Verdict = "not measured"
    elif all(one.low > -claim.margin for one in known):
        verdict = "holds"
    else:
        verdict = "fails" if any(one.high < -claim.margin for one in known) else "undecided"
    return Outcome(claim=claim, comparisons=comparisons, verdict=verdict)


def _compare(better: Number, worse: Number, values: Callable[[Number], dict[int, float]]) -> Comparison:
    first, second = values(better), values(worse)
    seeds = sorted(first.keys() & second.keys())
    differences = [first[seed] - second[seed] for seed in seeds]
    return Comparison(
        better=better,
        worse=worse,
        values=(tuple(first[seed] for seed in seeds), tuple(second[seed] for seed in seeds)),
        difference=interval(differences) if differences else None,
    )
