"""Claims are judged only by the interval of paired differences."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from iwm_fast.lab.claims import judge, num_tuned_of, seeds_needed, student_interval, values_by_seed
from iwm_fast.lab.config import Claim, ResultSelector
from iwm_fast.lab.report import format_difference


def select(cell):
    return ResultSelector(cell=cell, result="mrr_default", subject="jitter", metric="mrr")


def claim(*pairs, margin=0.0):
    compare = tuple((select(a), select(b)) for a, b in pairs)
    return Claim(name="c", text="t", paper="p", compare=compare, margin=margin)


def verdict(values, *pairs, margin=0.0):
    return judge(claim(*pairs, margin=margin), lambda selector: dict(enumerate(values.get(selector.cell, ())))).verdict


def test_the_interval_is_students():
    interval = student_interval([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.302653, and the standard error is 1 / sqrt(3).
    half = interval.high - interval.mean
    assert interval.mean == 2.0 and half == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)
    assert interval.mean - interval.low == pytest.approx(half)


def test_an_undecided_comparison_says_how_many_seeds_would_decide_it():
    # Mean 0.1, spread 0.3.
    values = [-0.2, 0.1, 0.4]
    count = seeds_needed(values)
    assert count == 38
    half = [stats.t.ppf(0.975, n - 1) * 0.3 / math.sqrt(n) for n in (count - 1, count)]
    assert half[0] >= 0.1 > half[1]
    assert seeds_needed(values, bound=-0.1) < count
    # Decided, a single seed, or no difference.
    assert seeds_needed([0.09, 0.1, 0.11]) is seeds_needed([0.1]) is seeds_needed([-0.1, 0.1]) is None
    comparison = judge(
        claim(("a", "b")),
        lambda selector: {0: 0.3, 1: 0.4, 2: 0.8} if selector.cell == "a" else {0: 0.2, 1: 0.5, 2: 0.3},
    )
    assert comparison.comparisons[0].seeds_needed and "seeds would decide)" in format_difference(
        comparison.comparisons[0]
    )


def test_with_one_seed_a_claim_is_undecided():
    assert (student_interval([0.3]).low, student_interval([0.3]).high) == (-math.inf, math.inf)
    assert verdict({"a": [0.9], "b": [0.1]}, ("a", "b")) == "undecided"
    with pytest.raises(ValueError, match="at least one number"):
        student_interval([])


def test_the_verdict_depends_on_the_intervals_of_all_comparisons():
    values = {"a": [0.50, 0.52, 0.51], "b": [0.10, 0.11, 0.12], "noisy": [0.1, 0.9, 0.5]}
    assert verdict(values, ("a", "b")) == "holds"
    assert verdict(values, ("b", "a")) == "fails"
    assert verdict(values, ("noisy", "b")) == "undecided"
    assert verdict(values, ("a", "b"), ("noisy", "b")) == "undecided"
    assert verdict(values, ("a", "b"), ("b", "a")) == "fails"
    assert verdict(values, ("a", "b"), ("a", "absent")) == "not measured"


def test_differences_are_paired_by_seed():
    # Seeds differ much; cells differ little, but always in the same direction.
    values = {"a": [0.11, 0.51, 0.91], "b": [0.10, 0.50, 0.90]}
    assert verdict(values, ("a", "b")) == "holds"


def test_a_margin_allows_the_first_result_to_be_slightly_worse():
    values = {"a": [0.50, 0.51, 0.52], "b": [0.51, 0.52, 0.53]}
    assert verdict(values, ("a", "b")) == "fails"
    assert verdict(values, ("a", "b"), margin=0.02) == "holds"
    assert verdict(values, ("a", "b"), margin=0.005) == "fails"


def test_only_seeds_that_have_both_results_are_compared():
    values = {"a": {0: 1.0, 1: 2.0, 2: 9.0}, "b": {1: 1.0, 2: 7.0}}
    (comparison,) = judge(claim(("a", "b")), lambda selector: values[selector.cell]).comparisons
    assert comparison.values == ((2.0, 9.0), (1.0, 7.0))
    assert comparison.difference is not None and comparison.difference.mean == 1.5


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.floats(-1, 1))
def test_an_interval_contains_the_mean_and_shifts_with_the_values(values, shift):
    interval, shifted = student_interval(values), student_interval([value + shift for value in values])
    assert interval.low <= interval.mean + 1e-12 and interval.mean <= interval.high + 1e-12
    assert shifted.low == pytest.approx(interval.low + shift, abs=1e-9)


def test_values_are_selected_from_the_rows_of_a_lab_by_seed():
    measured = [(0, "mrr_default", 0.2), (0, "mrr_strong", 0.4), (1, "mrr_default", 0.9)]
    rows = [
        {"cell": cell, "seed": seed, "result": result, "subject": "jitter", "metric": metric, "value": value + extra,
         "num_tuned": tuned}
        for cell, tuned, extra in (("a", 7, 0.0), ("b", 0, 1.0)) for metric in ("mrr", "recall_at_1")
        for seed, result, value in measured if (cell, metric) != ("b", "recall_at_1")
    ]  # fmt: skip
    assert values_by_seed(select("a"), rows) == {0: 0.2, 1: 0.9}
    assert values_by_seed(replace(select("b"), result="mrr_strong"), rows) == {0: 1.4}
    assert values_by_seed(replace(select("b"), metric="recall_at_1"), rows) == {}
    assert [num_tuned_of(select(cell), rows) for cell in "abc"] == [7, 0, 0]
