"""A session: the check before the timing, failures that are written down, time that runs out."""

import pytest
import torch

from benchmarks.harness import records
from benchmarks.harness.providers import Provider
from benchmarks.harness.records import PASSES
from benchmarks.harness.rooflines import Cost
from benchmarks.harness.session import Case, Session, WrongResultError
from benchmarks.harness.timing import Effort

TRY = Effort(seconds=0.0, fewest=2, most=2, warm_ups=1)
CASE = Case("task", {"N": 4}, costs=dict.fromkeys(PASSES, Cost(1000, 0)))
NAMES = ("out", "d_x")


def session(**values):
    return Session({"copy_bytes_per_s": 1e6}, effort=TRY, device="cpu", **values)


def provider(function, name="fused"):
    torch.manual_seed(0)
    return Provider(name, function, (torch.randn(4, requires_grad=True),), (torch.randn(4),))


def check(one, rows=lambda tensor: tensor):
    place = session()
    plain = provider(lambda x: x * x, "plain")
    exact = plain.in_double(plain.function)
    return place.check(CASE, NAMES, fused=one, plain=plain, exact=exact, rows=rows), place.records


def test_a_right_result_passes_and_its_errors_are_written_down():
    is_able, found = check(provider(lambda x: x.pow(2)))
    assert is_able
    assert [(one.what, one.provider) for one in found] == [("task error", "fused"), ("task error", "plain")]
    assert list(found[0].figures) == ["out", "d_x"]


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x * x * 1.1, lambda x: x * x.detach(), lambda x: x * x + float("nan"), lambda x: x * x + x.max()],
    ids=["scaled", "half a gradient", "nan", "shifted"],
)
def test_a_wrong_result_or_gradient_ends_the_run(wrong):
    with pytest.raises(WrongResultError, match=r"task N=4: (out|d_x) of fused is off by"):
        check(provider(wrong))


def test_a_fused_operation_that_raises_is_written_down_and_not_timed():
    def broken(x):
        raise RuntimeError("out of shared memory\nthe rest")

    is_able, found = check(provider(broken))
    assert not is_able
    assert found[0].failure == "RuntimeError: out of shared memory"


def test_every_pass_of_every_provider_is_a_line(tmp_path):
    out = tmp_path / "x.jsonl"
    place = session(out=out, without=["slow"])
    names = ("fused", "eager", "very slow")
    place.measure(CASE, [provider(lambda x: x * x, name) for name in names])
    found = records.read(out)
    assert found == place.records
    assert [(one.pass_, one.provider) for one in found] == [(p, name) for p in PASSES for name in names[:2]]
    for one in found:
        assert one.repeats == 2 and one.bytes == 1000 and one.flops is None
        # 1000 bytes at a megabyte per second are a millisecond
        assert one.share_of_floor == pytest.approx(1 / one.median_ms)


def test_one_that_cannot_go_backward_drops_out_there():
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no backward")

    place = session()
    place.measure(CASE, [provider(lambda x: x * x), provider(Forward.apply, "peer")])
    found = [(one.pass_, one.failure) for one in place.records if one.provider == "peer"]
    assert found == [("forward", None), ("backward", "RuntimeError: no backward")]
    assert sum(one.provider == "fused" for one in place.records) == 3


def test_nothing_new_is_started_when_time_is_up(capsys):
    assert session(limit_s=100).has_time(CASE)
    late = session(limit_s=-1)
    assert not late.has_time(CASE)
    assert late.left_out == ["task N=4"]
