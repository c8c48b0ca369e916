"""The benchmark of the training step with tiny networks on a CPU, and the arithmetic of its tables."""

import dataclasses
import gc
import math
import time
import weakref
from itertools import cycle
from types import SimpleNamespace

import pytest
import torch

from benchmarks import report
from benchmarks.harness import device, records
from benchmarks.harness.device import UnusableGpuError
from benchmarks.harness.records import Record
from benchmarks.harness.session import Case, Session, WrongResultError
from benchmarks.harness.timing import QUICK, Failure
from benchmarks.train_step import __main__ as benchmark
from benchmarks.train_step import measure, profile
from benchmarks.train_step import report as step_tables
from benchmarks.train_step.engines import Training, Variant, engine_variants, ops_variants
from benchmarks.train_step.measure import Comparison, StepRound
from benchmarks.train_step.report import (
    BARE,
    BASE,
    CACHED,
    COMPILED,
    DDP,
    DEFAULT,
    LOADING,
    OPS,
    PLAIN,
    SHARDS,
    SMALL,
    STEP,
    ZERO,
)
from benchmarks.train_step.workload import StepBudget, StepWorkload, build_workload
from iwm_fast.config.run import ModelConfig
from iwm_fast.monitoring.step_timer import PHASES
from iwm_fast.runtime import distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture
def workload():
    return build_workload(torch.device("cpu"), quick=True)


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()
    gc.collect()


@pytest.fixture
def session() -> Session:
    return Session({"cores": 2, "run": "2026-01-01"}, budget=QUICK, device="cpu")


def step_round(step_s: float, **parts: float) -> StepRound:
    return StepRound(step_s, dict.fromkeys(PHASES, 0.0) | parts)


def test_all_engines_are_timed_and_compared_with_the_bare_loop(session, workload, rank_info):
    benchmark.compare_engines(session, workload, rank_info)
    recorded = {record.provider: record for record in session.records}
    assert list(recorded) == [BARE, PLAIN, DEFAULT]
    assert recorded[DEFAULT].figures["over"] == BARE and "over_percent" not in recorded[BARE].figures
    for record in recorded.values():
        assert record.failure is None and record.what == STEP and record.repeats == 2 and record.shape["ranks"] == 1
        figures = record.figures
        # On a busy machine the process may be interrupted between two phases, for as long as a step takes and longer.
        assert 0 < sum(figures[f"{part}_ms"] for part in PHASES) / record.median_ms < 1.01
        assert figures["images_per_s"] == pytest.approx(4e3 / record.median_ms, abs=0.01)
        assert 0 < figures["teacher_update_percent"] < 100
    text = step_tables.sections(session.records)
    assert "### Steps" in text and "### Parts of a step, ms" in text and DEFAULT in text


def test_steps_that_read_shards_are_timed_beside_steps_from_a_batch_in_memory(session, workload, rank_info, folder):
    benchmark.compare_loading(session, workload, rank_info, folder=folder)
    recorded = {record.provider: record for record in session.records}
    assert list(recorded) == [CACHED, SHARDS] and recorded[SHARDS].failure is None
    assert all(record.figures["wait_ms"] > 0 and record.median_ms > 0 for record in recorded.values())
    assert recorded[SHARDS].what == LOADING and recorded[SHARDS].shape["engine"] == DEFAULT


def test_an_engine_that_raises_drops_out_and_the_others_continue(workload, rank_info):
    plain = Variant({"engine": "plain"})
    wrong = Variant(plain.runtime | {"micro_batch_size": 3})
    comparison = measure.compare(workload, {"wrong": wrong, PLAIN: plain}, rank_info)
    assert isinstance(comparison.failures["wrong"], Failure) and len(comparison.rounds[PLAIN]) == 2
    measure.check_losses(comparison.losses, "wrong", workload.precision)


def test_a_round_keeps_no_predictions(rank_info):
    """Otherwise the memory of a step would include those of the steps before it."""
    predictions, timer = [], SimpleNamespace(seconds=lambda: dict.fromkeys(PHASES, 0.0))

    class Stub:
        def step(self, batches):
            prediction = torch.zeros(1)
            predictions.append(weakref.ref(prediction))
            assert sum(reference() is not None for reference in predictions) == 1
            return SimpleNamespace(prediction=prediction, timer=timer)

    measure.run_round(Stub(), iter([]), 3, rank_info)
    assert len(predictions) == 3


@pytest.mark.parametrize("place", ["run_round", "profile_step"])
def test_an_error_after_the_first_round_keeps_what_was_measured(session, workload, rank_info, monkeypatch, place):
    function, names = getattr(measure, place), []

    def fail_later(*arguments):
        names.append(place)
        if len(names) == (3 if place == "run_round" else 1):
            raise RuntimeError("out of memory")
        return function(*arguments)

    monkeypatch.setattr(measure, place, fail_later)
    variants = {BARE: Variant({}), PLAIN: Variant({"engine": "plain"})}
    comparison = measure.compare(workload, variants, rank_info, is_profiled=place == "profile_step")
    case = benchmark.Case(STEP, workload.shape(1), workload.precision)
    measure.record(session, workload, case, comparison, baseline=BARE, rank_info=rank_info)
    recorded = {record.provider: record for record in session.records}
    assert recorded[BARE].median_ms and recorded[PLAIN].median_ms
    if place == "run_round":
        # The second round begins with the last variant.
        assert recorded[PLAIN].repeats == 1 and recorded[PLAIN].failure == "RuntimeError: out of memory"
        assert recorded[BARE].repeats == 2 and recorded[BARE].failure is None
    else:
        assert recorded[f"{BARE}, profile"].failure == "RuntimeError: out of memory"
        assert recorded[BARE].failure is None and "profile_ms" in recorded[PLAIN].figures


def test_an_engine_that_breaks_the_gpu_is_recorded_and_left_out_by_the_next_run(
    session, workload, rank_info, monkeypatch
):
    errors = []

    def synchronize():
        if errors:
            raise RuntimeError(errors[0])

    monkeypatch.setattr(device, "synchronize", synchronize)
    warm_up = Training.warm_up

    def break_gpu(training, batches, steps):
        warm_up(training, batches, steps)
        if training._engine.__class__.__name__ != "BareEngine":
            errors.append("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Training, "warm_up", break_gpu)
    with pytest.raises(UnusableGpuError):
        benchmark.compare_engines(session, workload, rank_info, with_deepspeed=False)
    assert [record.provider for record in session.records] == [PLAIN]
    errors.clear()
    benchmark.compare_engines(session, workload, rank_info, with_deepspeed=False)
    assert [(each.provider, each.failure is None) for each in session.records[1:]] == [(PLAIN, False), (BARE, True)]


def test_there_is_one_round_after_the_deadline(workload, rank_info):
    comparison = measure.compare(
        workload, {BARE: Variant({}), PLAIN: Variant({})}, rank_info, deadline=time.monotonic() - 1
    )
    assert list(comparison.rounds) == [BARE] and len(comparison.rounds[BARE]) == 1


def test_losses_that_differ_from_the_baseline_are_an_error(workload, rank_info):
    bare = Training(Variant({}), workload, rank_info)
    bare.warm_up(cycle(workload.batches(rank_info)[:1]), 3)
    losses = bare.losses
    assert losses[0] != losses[2]
    # These are the losses of an engine that never changes the weights.
    with pytest.raises(WrongResultError, match=r"lazy: loss .* in step 2, bare loop has"):
        measure.check_losses({BARE: losses, "lazy": losses[:2] + losses[:1]}, BARE, "fp32")
    with pytest.raises(WrongResultError):
        measure.check_losses({BARE: losses, "not a number": [math.nan] * 3}, BARE, "fp32")


def test_made_up_batches_have_the_masks_of_training_and_split_over_ranks(workload, rank_info):
    batches = workload.batches(rank_info)
    shares = [workload.batches(dataclasses.replace(rank_info, rank=rank, world_size=2)) for rank in range(2)]
    assert len(batches) == 4 and len({len(batch.context.row) for batch in batches}) > 1, (
        "contexts differ from step to step"
    )
    for batch, *parts in zip(batches, *shares, strict=True):
        assert sum((part.target.lengths for part in parts), ()) == batch.target.lengths
        assert {part.target.total for part in parts} == {batch.target.total} == {len(batch.target.row)}
        assert torch.cat([part.slot for part in parts]).tolist() == batch.slot.tolist()


def test_overheads_are_ratios_within_a_round():
    # The machine is half as fast in the second round, for all engines alike.
    ours = [step_round(step_s) for step_s in (1.1, 2.2, 1.2)]
    baseline = [step_round(step_s) for step_s in (1.0, 2.0, 1.0)]
    assert measure.overhead_percent(ours, baseline) == pytest.approx(10.0)
    figures = measure.part_figures([step_round(1.0, wait=0.1), step_round(2.0, wait=0.4), step_round(1.0, wait=0.1)])
    assert figures["wait_ms"] == 100.0 and figures["wait_percent"] == 10.0


def test_mfu_and_memory_are_recorded_on_a_gpu(session, workload, monkeypatch):
    monkeypatch.setattr("iwm_fast.monitoring.throughput.peak_flops", lambda device, precision: (1e12, "card"))
    comparison = Comparison(rounds={BARE: [step_round(0.004)]}, resident_bytes={BARE: 2_000_000_000})
    gpu = distributed.RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cuda", 0))
    case = benchmark.Case(STEP, workload.shape(1), workload.precision)
    measure.record(session, workload, case, comparison, baseline=BARE, rank_info=gpu)
    (record,) = session.records
    # 4 images in 4 ms are 1000 images per second.
    expected = 100 * 1000 * measure.build_throughput_meter(workload.config(), gpu).flops_per_image / 1e12
    assert record.figures["mfu_percent"] == pytest.approx(expected, abs=0.01) and record.figures["memory_gb"] == 2.0
    assert "card with fp32" in step_tables.speeds(session.records)


def test_engines_depend_on_device_ranks_and_what_is_installed(workload, rank_info):
    assert list(engine_variants(workload, rank_info, with_deepspeed=False)) == [BARE, PLAIN]
    two = dataclasses.replace(rank_info, world_size=2)
    assert list(engine_variants(workload, two, with_deepspeed=True)) == [DDP, *ZERO]
    gpu = build_workload(torch.device("cuda", 0), quick=False)
    names = list(engine_variants(gpu, rank_info, with_deepspeed=True))
    assert names == [BARE, PLAIN, DEFAULT, BARE + COMPILED, PLAIN + COMPILED, DEFAULT + COMPILED]
    assert gpu.name == BASE
    assert gpu.model == ModelConfig(predictor=dataclasses.replace(ModelConfig().predictor, depth=18))
    assert len(ops_variants(gpu)) == 2 * len(ops_variants(workload)) == 8


@pytest.mark.fused
def test_operations_are_timed_one_after_the_other_and_profiled(session, workload, rank_info, monkeypatch):
    one_round = dataclasses.replace(workload, budget=StepBudget(rounds=1, steps=1, warm_ups=1))
    chosen = {name: ops_variants(workload)[name] for name in ("reference", "fused norm only")}
    monkeypatch.setattr(benchmark, "ops_variants", lambda _: chosen)
    draw, drawn = StepWorkload.batches, []
    monkeypatch.setattr(StepWorkload, "batches", lambda *each: drawn.append(each) or draw(*each))
    for _ in range(2):
        benchmark.compare_ops(session, one_round, rank_info)
        session._measured = {record.group for record in session.records}
    assert len(drawn) == 1, "all variants train on the same batches, and what is measured needs none"
    assert [record.provider for record in session.records] == list(chosen)
    for record in session.records:
        assert record.what == OPS and record.failure is None and record.figures["profile_ms"]["products"] > 0
    assert "fused norm only" in step_tables.profiles(session.records)
    # Operations that train to another loss are wrong.
    session.records[1].figures["losses"][0] *= 2
    with pytest.raises(WrongResultError, match="fused norm only: loss"):
        benchmark.compare_ops(session, one_round, rank_info)


def test_every_step_of_a_training_has_a_batch_of_its_own(workload, rank_info, monkeypatch):
    batches, seen = workload.batches(rank_info), []
    step = Training.step
    monkeypatch.setattr(Training, "step", lambda self, source: step(self, (seen.append(b.step) or b for b in source)))
    measure.compare(workload, {PLAIN: Variant({"engine": "plain"})}, rank_info, batches=batches)
    assert seen == [0, 1, 2, 3]


def test_a_trial_on_a_gpu_has_the_precision_of_the_kernels():
    precisions = {place: build_workload(torch.device(place), quick=True).precision for place in ("cuda", "cpu")}
    assert precisions == {"cuda": "bf16", "cpu": "fp32"}


def test_a_training_with_fused_operations_that_failed_is_a_failure_of_the_command(tmp_path, monkeypatch, capsys):
    failing = ["reference", "fused, profile"]
    monkeypatch.setattr(
        benchmark,
        "compare_ops",
        lambda session, *_: [
            session.record(Case(OPS, {"variant": "fused"}), name, failure="wrong") for name in failing
        ],
    )
    arguments = ["--synthetic", "--quick", "--only", "ops", "--out"]
    assert benchmark.main([*arguments, str(tmp_path / "first")]) == 0
    failing += ["fused"]
    # Also where an earlier run has recorded it.
    for _ in range(2):
        assert benchmark.main([*arguments, str(tmp_path / "second")]) == 1
        assert capsys.readouterr().err.endswith("fused failed: wrong\n")


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("void pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopA_bias_TNT", "products"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32", "products"),
        ("_attention_backward", "attention"),
        ("_norm_forward", "norm"),
        ("void at::native::vectorized_layer_norm_kernel<float>", "norm"),
        ("triton_per_fused_add_native_layer_norm_3", "norm"),
        ("void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float, float, 64u>", "norm"),
        ("triton_per_fused_add_addmm_native_layer_norm_view_4", "norm"),
        ("triton_poi_fused_addmm_gelu_view_3", "GELU"),
        ("triton_tem_fused_addmm_gelu_view_3", "products"),
        ("aten::addmm", "products"),
        ("at::native::GeluBackwardCUDAKernelImpl(at::TensorIteratorBase&)", "GELU"),
        ("at::native::(anonymous namespace)::multi_tensor_apply_kernel<LpNormFunctor<float>>", "optimizer"),
        ("void at::native::lpnorm_cleanup<float, NormType::L2>", "optimizer"),
        ("at::native::multi_tensor_apply_kernel<FusedAdam>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies"),
        ("at::native::reduce_kernel<128, 4>", "sums"),
        ("at::native::vectorized_elementwise_kernel<4, MulFunctor>", "other"),
    ],
)
def test_kernels_are_grouped_by_what_they_do(kernel, group):
    assert profile.group_of(kernel) == group


def test_gaps_are_the_time_in_which_no_kernel_runs():
    kernels = [("gelu", 0, 2000), ("gemm", 5000, 9000), ("gemm", 6000, 8000), ("gemm", 10_000, 11_000)]
    times = profile.group_times(kernels)
    assert (times["GELU"], times["products"], times["gaps"]) == (2.0, 7.0, 4.0)
    assert set(profile.group_times([]).values()) == {0.0}


def record(provider, images_per_s, *, gpu: str | None = "NVIDIA H200", what=STEP, model=BASE, **figures):
    machine = {"run": "2026-01-01", "cores": 2} | ({"gpu": gpu} if gpu else {})
    shape = {"model": model, "view": 224, "B": 256, "ranks": 1}
    figures = {"images_per_s": images_per_s, **figures}
    return Record(what=what, provider=provider, shape=shape, figures=figures, machine=machine)


def measured(recorded) -> list[str]:
    return [goal.verdict(recorded)[1] for goal in step_tables.GOALS]


def test_goals_count_only_their_machine_and_networks():
    nothing = ["not yet measured"] * 6
    assert measured([]) == nothing
    other_gpu, other_networks = record(DEFAULT, 9999, gpu="NVIDIA H100"), record(DEFAULT, 9999, model="tiny")
    assert measured([other_gpu, other_networks]) == nothing
    on_cpu = record(DEFAULT, 3.0, gpu=None, model=SMALL, over="bare loop", over_percent=4.0, teacher_update_percent=1.5)
    assert measured([on_cpu])[:2] == ["4.00", "1.50"]
    on_gpu = [
        record(DEFAULT + COMPILED, 2500, teacher_update_percent=1.0),
        record(DEFAULT, 1500, teacher_update_percent=0.5),
        record(BARE, 2600, teacher_update_percent=0.5),
        record(CACHED, 2500, what=LOADING, wait_percent=0.0),
        record(SHARDS, 2400, what=LOADING, wait_percent=0.4),
    ]
    assert measured(on_gpu)[2:] == ["2500.00", "1.00", "96.00", "0.40"]


def test_the_command_writes_records_and_prints_goals(folder, tmp_path, capsys):
    arguments = ["--quick", "--data", str(folder), "--out", str(tmp_path)]
    assert benchmark.main([*arguments, "--only", "loader"]) == 0
    printed = capsys.readouterr().out
    assert "DeepSpeed ZeRO-1 over the bare loop" in printed and "not yet measured" in printed
    (path,) = tmp_path.iterdir()
    recorded = records.read(path)
    assert [record.provider for record in recorded] == [CACHED, SHARDS, ""]
    assert recorded[0].machine["deepspeed"]
    text = report.render(steps=recorded)
    assert "## " in text and CACHED in text
    assert benchmark.main([*arguments, "--limit-s", "-1", "--only", "engines"]) == 0
    assert "skipped: engines" in capsys.readouterr().out and records.read(path) == recorded
    gc.collect()


def test_deepspeed_that_is_asked_for_must_be_installed(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "has_deepspeed", lambda: False)
    assert benchmark.main(["--engine", "deepspeed"]) == 2
    assert "DeepSpeed is not installed" in capsys.readouterr().err
