"""Timing: spread, turns, failures. On a CPU these use the host's clock."""

import pytest
import torch

from benchmarks.harness import timing
from benchmarks.harness.providers import Provider
from benchmarks.harness.records import BACKWARD, BOTH, FORWARD
from benchmarks.harness.timing import Effort, Failure, Timing, Work

TRY = Effort(seconds=0.0, fewest=3, most=3, warm_ups=1)


def test_a_timing_is_told_by_median_and_percentiles():
    times = [(float(device), 10.0 + device) for device in range(11)]
    assert timing.summarize(times) == Timing(median_ms=5.0, p20_ms=2.0, p80_ms=8.0, repeats=11, host_ms=15.0)


def test_providers_run_in_turns_after_warming_up():
    calls = []
    works = {name: Work(lambda _, name=name: calls.append(name)) for name in "ABC"}
    found = timing.compare(works, effort=TRY)
    assert "".join(calls) == "ABC" + "ABC" + 3 * "ABC"
    assert list(found) == ["A", "B", "C"] and found["A"].repeats == 3


def test_repeats_follow_from_the_time_there_is():
    effort = Effort(seconds=10.0, fewest=2, most=7, warm_ups=1)
    assert timing.measure(lambda: None, effort=effort).repeats == 7


def test_what_raises_is_a_failure_and_the_others_go_on():
    def broken(_):
        raise ValueError("no such backend\nand a long story")

    found = timing.compare({"good": Work(lambda _: None), "bad": Work(broken)}, effort=TRY)
    assert isinstance(found["good"], Timing)
    assert found["bad"] == Failure("ValueError: no such backend")
    with pytest.raises(RuntimeError, match="no such backend"):
        timing.measure(lambda: broken(None), effort=TRY)


def test_what_is_prepared_is_passed_on_anew_each_time():
    seen = []
    timing.compare({"it": Work(seen.append, iter(range(100)).__next__)}, effort=TRY)
    assert seen == list(range(5))


@pytest.mark.parametrize(("pass_", "forwards"), [(FORWARD, 5), (BACKWARD, 5), (BOTH, 5)])
def test_every_backward_has_a_forward_of_its_own(pass_, forwards):
    calls = []
    x = torch.ones(3, requires_grad=True)
    one = Provider("", lambda x: calls.append("f") or x * x, (x,), (torch.ones(3),))
    result = timing.compare({"": one.work(pass_)}, effort=TRY)[""]
    assert isinstance(result, Timing) and len(calls) == forwards
    assert x.grad is None, "gradients are returned, never added to what was there"


def test_bandwidth_counts_bytes_read_and_written():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert timing.copy_bandwidth(device, num_bytes=1 << 16, effort=TRY) > 0
