"""All sections with tiny shapes. Without a GPU kernels are interpreted, and baselines compute on the CPU."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.harness import device, machine, results
from benchmarks.harness.device import UnusableGpuError
from benchmarks.harness.records import BACKWARD, FORWARD, PASSES
from benchmarks.harness.session import Case, Session
from benchmarks.harness.timing import TRIAL
from benchmarks.kernels import __main__ as benchmark
from benchmarks.kernels import attention, compiler_report, conditioning, report, residual_norm, tile_sweep
from benchmarks.kernels.tile_sweep import SHIPPED, SWEEP
from fixtures.kernel_cases import DEVICE, draw, offsets_of
from iwm_fast.kernels.attention.kernels import LaunchConfig
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.launch import IS_INTERPRETING, Launch
from iwm_fast.kernels.ops import FUSED, REFERENCE

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the behaviour without a GPU")


@pytest.fixture
def session():
    torch.manual_seed(0)
    return Session({"copy_bytes_per_s": 1e9}, budget=TRIAL, device=DEVICE, excluded=["compiled"])


def passes_of(session, provider):
    timed = [record for record in session.records if record.median_ms is not None]
    return [record.pass_ for record in timed if record.provider == provider]


@pytest.mark.fused
def test_equal_and_packed_lengths_are_timed_beside_pytorchs_attention(session):
    attention.compare(session, [5, 5], 32, "", 1)
    attention.compare(session, [5, 7], 32, attention.CONTEXTS, 1)
    assert session.wrong == [] and passes_of(session, "fused") == 2 * list(PASSES)
    for name, passes in {"cuDNN": PASSES, "FA2": PASSES, "varlen_attn": PASSES}.items():
        assert passes_of(session, name) == list(passes)


def test_lengths_are_those_of_random_masks(session, monkeypatch):
    compared = []
    monkeypatch.setattr(attention, "compare", lambda session, *case: compared.append(case))
    monkeypatch.setattr(session, "quick", False)
    attention.run(session)
    by_name = {(name, head_dim): lengths for lengths, head_dim, name, _ in compared}
    assert by_name["", 64] == [256, 256] and compared[0][0] == compared[1][0] == [196, 196]
    # Contexts of default masks hold about half of the patches; with a rectangle, not all patches are seen.
    assert all(40 < length < 160 for length in by_name[attention.CONTEXTS, 64])
    assert max(by_name[attention.CROPPED, 32]) <= 196


@pytest.mark.fused
@pytest.mark.parametrize("kind", ["feature", "sequence"])
def test_conditioning_is_timed(session, kind):
    conditioning.measure(session, kind, 1, 16)
    assert session.wrong == [] and passes_of(session, "fused") == passes_of(session, "eager") == list(PASSES)


@pytest.mark.fused
def test_the_residual_norm_is_timed(session):
    residual_norm.measure(session, 4, 16)
    assert session.wrong == [] and passes_of(session, "fused") == passes_of(session, "eager") == list(PASSES)


def test_every_group_of_lengths_is_checked_at_its_borders(session, monkeypatch):
    checked = {}
    monkeypatch.setattr(
        attention, "check_lengths", lambda session, name, lengths, kind: checked.update({(name, kind): lengths})
    )
    attention.check(session)
    limits = [(1, 64), (65, 128), (129, 192), (193, 208), (209, 224), (225, 256)]
    kinds = {kind for _, kind in checked}
    for kind in kinds:
        for low, high in limits:
            assert {low, high} <= set(checked[f"{low}-{high}", kind]) <= set(range(low, high + 1))
        assert checked["0-256", kind].count(0) == 2 and len(set(checked["equal", kind])) == 1
    assert len(checked) == len(kinds) * (len(limits) + 2)


@pytest.mark.fused
@pytest.mark.parametrize("is_wrong", [False, True])
def test_drawn_lengths_are_compared_with_one_sequence_after_the_other(session, monkeypatch, is_wrong):
    if is_wrong:
        broken = FUSED._replace(ragged_attention=lambda qkv, _: REFERENCE.ragged_attention(qkv, Sequences(None, 1, 1)))
        monkeypatch.setattr(attention, "FUSED", broken)
    for _ in range(2):
        attention.check_lengths(session, "1-9", [9, 0, 1, 4], (1, 32, "float16"))
    assert len(session.wrong) == (2 if is_wrong else 0)
    lengths = [record.figures["lengths"] for record in session.records if record.provider == "lengths"]
    assert lengths == ([[9, 0, 1, 4]] * 2 if is_wrong else [])
    assert ("wrong" in report.errors(session.records)) == is_wrong


def test_attention_of_single_sequences_equals_the_reference():
    lengths = [7, 0, 3, 5]
    qkv = draw(sum(lengths), 3, 2, 32)
    expected = REFERENCE.ragged_attention(qkv, Sequences.from_lengths(offsets_of(lengths), lengths))
    torch.testing.assert_close(attention.one_by_one(qkv, lengths), expected)


@pytest.mark.fused
@pytest.mark.parametrize("pass_", [FORWARD, BACKWARD])
def test_a_sweep_times_candidates_beside_the_shipped_launches(session, pass_):
    case = Case(SWEEP, {"N": 20, "d": 32, "H": 1, "B": 1})
    tile_sweep.sweep(session, case, pass_, [LaunchConfig(((32,),), 32, 4, 1)])
    outcomes = {record.provider: record.failure for record in session.records}
    assert outcomes == {SHIPPED: None, "32 q32 w4 s1": None}
    assert report.sweep_table(session.records).count("\n") == 2


@pytest.mark.fused
def test_a_launch_that_writes_nothing_is_not_timed(session):
    out = torch.ones(4, device=DEVICE)
    right = Launch(_Kernel(torch.Tensor.zero_), (1,), {"out": out}, {}, 4)
    wrong = right._replace(kernel=_Kernel(torch.Tensor.numel))
    candidates = {"right": right, "wrong": wrong}
    tile_sweep.time_launches(session, Case(SWEEP, {"N": 4}), FORWARD, candidates, [right], target=out)
    failures = {record.provider: record.failure for record in session.records}
    assert failures["right"] is None and failures[SHIPPED] is None and "differs" in failures["wrong"]


@pytest.mark.fused
def test_a_pass_that_was_cut_off_is_swept_again_without_what_broke_the_gpu(session, monkeypatch):
    out, errors = torch.ones(4, device=DEVICE), []

    def synchronize():
        if errors:
            raise RuntimeError(errors[0])

    def break_gpu(tensor):
        errors.append("CUDA error: an illegal memory access was encountered")
        raise RuntimeError(errors[0])

    monkeypatch.setattr(device, "synchronize", synchronize)
    right, case = Launch(_Kernel(torch.Tensor.zero_), (1,), {"out": out}, {}, 4), Case(SWEEP, {"N": 4})
    candidates = {"breaks": right._replace(kernel=_Kernel(break_gpu)), "right": right}

    def sweep():
        tile_sweep.time_launches(session, case, FORWARD, candidates, [right], target=out)
        return [record.provider for record in session.records]

    session.deadline = 0.0
    assert sweep() == [] and session.skipped == ["attention sweep N=4 bfloat16 forward: breaks"]
    session.deadline = math.inf
    with pytest.raises(UnusableGpuError):
        sweep()
    assert not tile_sweep.is_swept(session, case, FORWARD)
    errors.clear()
    assert sweep() == ["breaks", "right", SHIPPED] and tile_sweep.is_swept(session, case, FORWARD)


@pytest.mark.fused
def test_drawn_lengths_are_recorded_if_the_kernel_breaks_the_gpu(session, monkeypatch):
    def check(*_, **__):
        raise UnusableGpuError

    monkeypatch.setattr(session, "check", check)
    with pytest.raises(UnusableGpuError):
        attention.check_lengths(session, "1-9", [9, 0, 1, 4], (1, 32, "float16"))
    assert [record.figures for record in session.records] == [{"lengths": [9, 0, 1, 4]}]


class _Kernel:
    """A kernel that is a Python function of its tensor."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, grid):
        return lambda out, **_: self.function(out)

    def warmup(self, **arguments):
        return SimpleNamespace(n_spills=0, _init_handles=lambda: None)


def test_candidate_configs_cover_the_length():
    for length in (196, 197, 256, 102):
        for config in tile_sweep.candidate_configs(length):
            (split,) = config.key_splits
            # All tiles except the last one are full.
            assert sum(split[:-1]) < length <= sum(split)


@without_gpu
def test_offline_figures_are_refused_under_the_interpreter(capsys):
    assert IS_INTERPRETING
    assert benchmark.main(["--only", "offline"]) == 2
    assert "TRITON_INTERPRET is set" in capsys.readouterr().err


@pytest.mark.fused
@without_gpu
def test_a_second_run_keeps_what_is_measured(tmp_path, monkeypatch, capsys):
    calls = []
    sections = {"norm": lambda session: residual_norm.measure(session, 4, 16), "check": calls.append}
    monkeypatch.setattr(benchmark, "SECTIONS", sections)
    arguments = ["--out", str(tmp_path), "--commit", "x", "--only", "norm"]
    assert benchmark.main(arguments) == 0
    (path,) = tmp_path.glob(f"*{results.KERNELS}.jsonl")
    before = path.read_text()
    assert json.loads(before.splitlines()[0])["machine"]["commit"] == "x"
    # The last line says that the section is complete; without it, single measurements are kept.
    path.write_text("\n".join(before.splitlines()[:-1]) + "\n")
    assert benchmark.main(arguments) == 0
    assert (
        path.read_text().splitlines()[:-1] == before.splitlines()[:-1] and "earlier records" in capsys.readouterr().out
    )
    assert benchmark.main([*arguments, "check"]) == 0 and len(calls) == 1
    assert benchmark.main([*arguments[:2], "--commit", "y", "--only", "norm"]) == 0
    assert len(path.read_text().splitlines()) == 2 * len(before.splitlines()) + 1


def test_tables_show_the_figures_of_both_versions_of_triton():
    figures = {"registers": 126, "spill_bytes": 0, "shared_bytes": 9, "fast_products": 1, "matrix_products": 1,
               "warps": 4, "stages": 1, "programs": 4}  # fmt: skip
    old = Session({"triton": "3.6.0"}, budget=TRIAL, device="meta")
    new = Session({"triton": "3.9.0"}, budget=TRIAL, device="meta")
    case = Case("launch", {"arch": 90, "module": "residual_norm", "launch": "some"}, dtype="")
    old.record(case, "fused", figures=figures)
    new.record(case, "fused", figures=figures | {"registers": 158})
    recorded = [*new.records, *old.records]
    row = compiler_report.launch_tables(recorded, 90)["residual_norm on sm_90"].splitlines()[-1]
    assert "126 / 158" in row and row.count("/") == 1
    assert compiler_report.spill_summary(recorded).count("1 launches, 0 spill") == 2


def test_records_name_the_machine_without_packages_that_it_lacks(monkeypatch):
    monkeypatch.setattr(machine, "PACKAGES", ("numpy", "no-such-package"))
    assert "numpy" in machine.describe("x") and "no-such-package" not in machine.describe("x")
