"""A session: the check before timing, recorded failures, and the time limit."""

import re

import pytest
import torch

from benchmarks.harness import cli, device, records
from benchmarks.harness.device import UnusableGpuError
from benchmarks.harness.providers import Provider
from benchmarks.harness.records import PASSES
from benchmarks.harness.rooflines import Cost
from benchmarks.harness.session import Case, Session
from benchmarks.harness.timing import TimingBudget

SHORT = TimingBudget(seconds=0.0, min_repeats=2, max_repeats=2, warm_ups=1)
CASE = Case("square", {"N": 4}, costs=dict.fromkeys(PASSES, Cost(1000, 0)))
NAMES = ("out", "d_x")


def session(**values):
    return Session({"copy_bytes_per_s": 1e6}, budget=SHORT, device="cpu", **values)


def provider(function, name="fused"):
    torch.manual_seed(0)
    return Provider(name, function, (torch.randn(4, requires_grad=True),), (torch.randn(4),))


def check(fused, function=lambda x: x * x, **behind_relu):
    current = session()
    plain = provider(function, "plain")
    exact = plain.in_float64(lambda x: x * x)
    return current.check(CASE, NAMES, fused=fused, plain=plain, exact=exact, **behind_relu), current


def test_a_correct_result_passes_and_its_errors_are_recorded():
    is_right, current = check(provider(lambda x: x.pow(2)))
    recorded = current.records
    assert is_right and current.wrong == []
    assert [(entry.what, entry.provider) for entry in recorded] == [
        ("square error", "fused"),
        ("square error", "plain"),
    ]
    assert list(recorded[0].figures) == ["out", "d_x"]


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x * x * 1.1, lambda x: x * x.detach(), lambda x: x * x + float("nan"), lambda x: x * x + x.max()],
    ids=["scaled", "half a gradient", "nan", "shifted"],
)
def test_a_wrong_result_or_gradient_is_recorded_and_not_timed(wrong):
    is_right, current = check(provider(wrong))
    assert not is_right and len(current.wrong) == 1
    assert re.match(r"square N=4 bfloat16: (out|d_x) (\d|nan)", current.records[0].failure)


@pytest.mark.parametrize(("behind_relu", "is_right"), [((), False), (("d_x",), True)])
def test_only_behind_a_relu_a_gradient_may_have_the_largest_plain_error_of_any_tensor(behind_relu, is_right):
    def function(value_factor, gradient_factor):
        # Value and gradient of x * x, each with an error of its own.
        return lambda x: gradient_factor * x * x + (value_factor - gradient_factor) * (x * x).detach()

    plain, fused = function(1.1, 1), provider(function(1, 1.05))
    assert check(fused, plain, behind_relu=behind_relu)[0] == is_right


def test_an_output_may_not_have_the_plain_error_of_a_gradient():
    plain = lambda x: 1.1 * x * x - 0.1 * (x * x).detach()  # noqa: E731
    is_right, current = check(provider(lambda x: 1.05 * x * x), plain, behind_relu=("d_x",))
    assert not is_right and "out" in current.wrong[0] and "d_x" not in current.wrong[0].partition(";")[0]


def test_results_whose_bits_differ_from_run_to_run_are_wrong():
    noise = iter([1e-6, 2e-6])
    is_right, current = check(provider(lambda x: x * x * (1 + next(noise))))
    assert not is_right and "bits of out differ" in current.wrong[0]


def test_memory_that_an_operation_does_not_write_is_wrong():
    torch.use_deterministic_algorithms(False)
    is_right, current = check(provider(lambda x: x * x + 0 * torch.empty_like(x).detach()))
    assert not is_right and "nan" in current.wrong[0]
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_fused_operation_that_raises_is_recorded_and_not_timed():
    def broken(x):
        raise RuntimeError("out of shared memory\nthe rest")

    is_right, current = check(provider(broken))
    assert not is_right
    assert current.records[0].failure == "RuntimeError: out of shared memory"


@pytest.fixture
def fragile_gpu(monkeypatch):
    """Make `broken` leave the GPU unusable: it returns, and whatever waits for the GPU afterwards raises."""
    errors = []

    def synchronize():
        if errors:
            raise RuntimeError(errors[0])

    def broken(x):
        errors.append("CUDA error: an illegal memory access was encountered\nthe rest")
        return x * x

    monkeypatch.setattr(device, "synchronize", synchronize)
    return broken, errors


@pytest.mark.parametrize("broken_one", ["fused", "plain", "float64"])
def test_a_kernel_that_breaks_the_gpu_is_recorded_and_the_next_run_goes_on(tmp_path, fragile_gpu, broken_one):
    broken, errors = fragile_gpu
    out, good = tmp_path / "x.jsonl", lambda x: x * x
    fused, plain = (provider(broken if name == broken_one else good, name) for name in ("fused", "plain"))
    exact = plain.in_float64(broken if broken_one == "float64" else good)
    with pytest.raises(UnusableGpuError, match="cannot use the GPU any more: CUDA error: an illegal memory access"):
        session(out=out).check(CASE, NAMES, fused=fused, plain=plain, exact=exact)
    (record,) = records.read(out)
    assert record.provider == broken_one and "illegal memory access" in record.failure
    errors.clear()
    assert not session(out=out).check(CASE, NAMES, fused=fused, plain=plain, exact=exact)
    assert errors == [], "it is not run again"


def test_a_provider_that_breaks_the_gpu_is_recorded_alone_and_not_timed_again(tmp_path, fragile_gpu, monkeypatch):
    broken, errors = fragile_gpu
    out = tmp_path / "x.jsonl"

    def wait_and_time(function, spin_ms):
        function.run(function.prepare())
        device.synchronize()
        return 1.0, 1.0

    monkeypatch.setattr("benchmarks.harness.timing._time_once", wait_and_time)
    providers = [provider(broken, "broken"), provider(lambda x: x * x, "good")]
    with pytest.raises(UnusableGpuError):
        session(out=out).measure(CASE, providers)
    assert [(each.provider, each.pass_) for each in records.read(out)] == [("broken", "forward")]
    errors.clear()
    session(out=out).measure(CASE, providers)
    assert [(each.provider, each.pass_) for each in records.read(out)[1:]] == [("good", name) for name in PASSES[1:]]


def test_an_unusable_gpu_ends_the_sections_and_not_the_report(tmp_path, capsys):
    def broken(current):
        raise UnusableGpuError("this process cannot use the GPU any more")

    current = Session({"cpu": "x", "cores": 1}, budget=SHORT, device="cpu", out=tmp_path / "x.jsonl")
    report = type("report", (), {"sections": staticmethod(lambda recorded, level: f"{len(recorded)} records")})
    sections = {"first": lambda current: None, "second": broken, "third": broken}
    assert cli.run(current, sections, None, report) == 1
    printed = capsys.readouterr()
    assert "1 records" in printed.out and "run the same command again to continue after it" in printed.err
    assert [record.shape for record in records.read(current.out)] == [{"section": "first"}]


def test_each_pass_of_each_provider_is_recorded(tmp_path):
    out = tmp_path / "x.jsonl"
    current = session(out=out, excluded=["slow"])
    names = ("fused", "eager", "very slow")
    current.measure(CASE, [provider(lambda x: x * x, name) for name in names])
    recorded = records.read(out)
    assert recorded == current.records
    passes_and_names = [(pass_, name) for pass_ in PASSES for name in names[:2]]
    assert [(entry.pass_, entry.provider) for entry in recorded] == passes_and_names
    for entry in recorded:
        assert entry.repeats == 2 and entry.bytes == 1000 and entry.flops is None
        # 1000 bytes at a megabyte per second take a millisecond.
        assert entry.share_of_floor == pytest.approx(1 / entry.median_ms)


def test_a_provider_without_a_backward_pass_drops_out_there():
    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * x

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no backward")

    current = session()
    current.measure(CASE, [provider(lambda x: x * x), provider(Forward.apply, "peer")])
    peer = [(entry.pass_, entry.failure) for entry in current.records if entry.provider == "peer"]
    assert peer == [("forward", None), ("backward", "RuntimeError: no backward")]
    assert sum(entry.provider == "fused" for entry in current.records) == 3


def test_no_measurement_starts_after_the_time_limit(capsys):
    assert session(limit_s=100).has_time(CASE)
    late = session(limit_s=-1)
    assert not late.has_time(CASE)
    assert late.skipped == ["square N=4 bfloat16"]


def test_a_second_session_measures_only_what_is_missing(tmp_path):
    out, calls = tmp_path / "x.jsonl", []
    first = session(out=out)
    first.measure(CASE, [provider(lambda x: x * x)], PASSES[:1])
    check_provider = provider(lambda x: calls.append(1) or x * x * 1.1)
    plain = provider(lambda x: x * x, "plain")
    for _ in range(2):
        again = session(out=out)
        exact = plain.in_float64(plain.function)
        assert not again.check(CASE, NAMES, fused=check_provider, plain=plain, exact=exact)
        assert len(again.wrong) == 1 and len(calls) == 2, "a wrong result stays wrong without being computed again"
        again.measure(CASE, [provider(lambda x: x * x)])
    assert [(each.pass_, each.what) for each in again.records] == [
        ("forward", "square"), ("", "square error"), ("", "square error"), ("backward", "square"),
        ("forward+backward", "square"),
    ]  # fmt: skip
    other_commit = Session({"commit": "y"}, budget=SHORT, device="cpu", out=out)
    assert other_commit.records == [] and not other_commit.is_measured(CASE, "forward")
