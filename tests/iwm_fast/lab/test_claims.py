"""Claims are judged by the interval of paired differences, and by nothing else."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from iwm_fast.lab.claims import interval, judge, tuned_for, values_of
from iwm_fast.lab.config import Claim, Number


def number(cell):
    return Number(cell=cell, result="mrr_default", subject="jitter", metric="mrr")


def claim(*pairs, margin=0.0):
    compare = tuple((number(a), number(b)) for a, b in pairs)
    return Claim(name="c", text="t", paper="p", compare=compare, margin=margin)


def verdict(values, *pairs, margin=0.0):
    return judge(claim(*pairs, margin=margin), lambda one: dict(enumerate(values.get(one.cell, ())))).verdict


def test_the_interval_is_students_by_hand():
    found = interval([1.0, 2.0, 3.0])
    # t(0.975, 2) = 4.302653, standard error 1 / sqrt(3)
    assert found.mean == 2.0 and found.high - found.mean == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)


def test_one_seed_decides_nothing():
    assert interval([0.3]).low == -math.inf and interval([0.3]).high == math.inf
    assert verdict({"a": [0.9], "b": [0.1]}, ("a", "b")) == "undecided"
    with pytest.raises(ValueError, match="at least one number"):
        interval([])


def test_verdicts():
    values = {"a": [0.50, 0.52, 0.51], "b": [0.10, 0.11, 0.12], "noisy": [0.1, 0.9, 0.5]}
    assert verdict(values, ("a", "b")) == "holds"
    assert verdict(values, ("b", "a")) == "fails"
    assert verdict(values, ("noisy", "b")) == "undecided"
    assert verdict(values, ("a", "b"), ("noisy", "b")) == "undecided"
    assert verdict(values, ("a", "b"), ("b", "a")) == "fails"
    assert verdict(values, ("a", "b"), ("a", "absent")) == "not measured"


def test_differences_are_paired_by_seed():
    # seeds differ much, cells little, always in one direction
    values = {"a": [0.11, 0.51, 0.91], "b": [0.10, 0.50, 0.90]}
    assert verdict(values, ("a", "b")) == "holds"


def test_no_worse_than_leaves_a_margin():
    values = {"a": [0.50, 0.51, 0.52], "b": [0.51, 0.52, 0.53]}
    assert verdict(values, ("a", "b")) == "fails"
    assert verdict(values, ("a", "b"), margin=0.02) == "holds"
    assert verdict(values, ("a", "b"), margin=0.005) == "fails"


def test_seeds_that_only_one_of_both_has_are_left_out():
    found = judge(claim(("a", "b")), lambda one: {"a": {0: 1.0, 1: 2.0, 2: 9.0}, "b": {1: 1.0, 2: 7.0}}[one.cell])
    assert found.comparisons[0].values == ((2.0, 9.0), (1.0, 7.0))
    assert found.comparisons[0].difference is not None and found.comparisons[0].difference.mean == 1.5


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6), st.floats(-1, 1))
def test_an_interval_moves_with_its_values_and_holds_their_mean(values, shift):
    one, moved = interval(values), interval([value + shift for value in values])
    assert one.low <= one.mean + 1e-12 and one.mean <= one.high + 1e-12
    assert moved.low == pytest.approx(one.low + shift, abs=1e-9)


def test_a_number_is_found_among_the_rows_of_a_lab_by_seed():
    said = [(0, "mrr_default", 0.2), (0, "mrr_strong", 0.4), (1, "mrr_default", 0.9)]
    rows = [
        {"cell": cell, "seed": seed, "result": result, "subject": "jitter", "metric": metric, "value": value + extra,
         "num_tuned": tuned}
        for cell, tuned, extra in (("a", 7, 0.0), ("b", 0, 1.0)) for metric in ("mrr", "recall_at_1")
        for seed, result, value in said if (cell, metric) != ("b", "recall_at_1")
    ]  # fmt: skip
    assert values_of(number("a"), rows) == {0: 0.2, 1: 0.9}
    assert values_of(replace(number("b"), result="mrr_strong"), rows) == {0: 1.4}
    assert values_of(replace(number("b"), metric="recall_at_1"), rows) == {}
    assert [tuned_for(number(cell), rows) for cell in "abc"] == [7, 0, 0]
