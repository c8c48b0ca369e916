"""Timing: percentiles, alternation, failures. On a CPU these use the host's clock."""

import pytest
import torch

from benchmarks.harness import timing
from benchmarks.harness.providers import Provider
from benchmarks.harness.records import BACKWARD, BOTH, FORWARD
from benchmarks.harness.timing import Failure, TimedFunction, Timing, TimingBudget

SHORT = TimingBudget(seconds=0.0, min_repeats=3, max_repeats=3, warm_ups=1)


def test_a_timing_has_median_and_percentiles():
    times = [(float(device), 10.0 + device) for device in range(11)]
    assert timing.summarize(times) == Timing(median_ms=5.0, p20_ms=2.0, p80_ms=8.0, repeats=11, host_ms=15.0)


def test_functions_alternate_after_warming_up():
    calls = []
    functions = {name: TimedFunction(lambda _, name=name: calls.append(name)) for name in "ABC"}
    results = timing.compare(functions, budget=SHORT)
    assert "".join(calls) == "ABC" + "ABC" + 3 * "ABC"
    assert list(results) == ["A", "B", "C"] and results["A"].repeats == 3


def test_the_number_of_repeats_fills_the_time_budget():
    budget = TimingBudget(seconds=10.0, min_repeats=2, max_repeats=7, warm_ups=1)
    assert timing.measure(lambda: None, budget=budget).repeats == 7


def test_a_function_that_raises_is_a_failure_and_the_others_continue():
    def broken(_):
        raise ValueError("no such backend\nand a long story")

    results = timing.compare({"good": TimedFunction(lambda _: None), "bad": TimedFunction(broken)}, budget=SHORT)
    assert isinstance(results["good"], Timing)
    assert results["bad"] == Failure("ValueError: no such backend")
    with pytest.raises(RuntimeError, match="no such backend"):
        timing.measure(lambda: broken(None), budget=SHORT)


def test_a_function_that_raises_after_the_warm_up_is_a_failure_and_the_others_continue():
    left = [1, 2, 3]
    results = timing.compare({"bad": TimedFunction(lambda _: left.pop()), "good": TimedFunction(id)}, budget=SHORT)
    assert results["bad"] == Failure("IndexError: pop from empty list") and results["good"].repeats == 3


def test_each_call_gets_a_newly_prepared_argument():
    arguments = []
    timing.compare({"": TimedFunction(arguments.append, iter(range(100)).__next__)}, budget=SHORT)
    assert arguments == list(range(5))


@pytest.mark.parametrize("pass_", [FORWARD, BACKWARD, BOTH])
def test_each_backward_pass_has_its_own_forward(pass_):
    calls = []
    x = torch.ones(3, requires_grad=True)
    provider = Provider("", lambda x: calls.append("forward") or x * x, (x,), (torch.ones(3),))
    result = timing.compare({"": provider.timed_pass(pass_)}, budget=SHORT)[""]
    assert isinstance(result, Timing) and len(calls) == 5
    assert x.grad is None, "gradients are returned, not accumulated"


def test_the_copy_bandwidth_is_positive():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert timing.copy_bandwidth(device, num_bytes=1 << 16, budget=SHORT) > 0
