"""The benchmark of the training step with tiny networks on a CPU, and the arithmetic of its tables."""

import dataclasses
import gc
import json
import math
import time

import pytest
import torch
from benchmarks.train_step.two_ranks import compare_on_ranks

from benchmarks import report
from benchmarks.harness import records
from benchmarks.harness.records import Record
from benchmarks.harness.session import Session, WrongResultError
from benchmarks.harness.timing import QUICK, Failure
from benchmarks.train_step import __main__ as benchmark
from benchmarks.train_step import measure
from benchmarks.train_step import report as step_tables
from benchmarks.train_step.engines import Training, engine_configs
from benchmarks.train_step.measure import Comparison, StepRound
from benchmarks.train_step.report import (
    BARE,
    BASE,
    CACHED,
    COMPILED,
    DDP,
    DEFAULT,
    FUSED,
    LOADING,
    PLAIN,
    SHARDS,
    SMALL,
    STEP,
    ZERO,
)
from benchmarks.train_step.workload import build_workload
from iwm_fast.config.run import ModelConfig
from iwm_fast.monitoring.step_timer import PHASES
from iwm_fast.runtime import distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture
def workload(folder):
    return build_workload(folder, torch.device("cpu"), quick=True)


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
    assert list(recorded) == [BARE, PLAIN, *ZERO]
    assert recorded[DEFAULT].figures["over"] == BARE and "over_percent" not in recorded[BARE].figures
    for record in recorded.values():
        assert record.failure is None and record.what == STEP and record.repeats == 2 and record.shape["ranks"] == 1
        figures = record.figures
        assert record.median_ms == pytest.approx(sum(figures[f"{part}_ms"] for part in PHASES), rel=0.2)
        assert figures["images_per_s"] == pytest.approx(4e3 / record.median_ms, rel=1e-3)
        assert 0 < figures["teacher_update_percent"] < 50 and figures["wait_ms"] < figures["forward_ms"]
    text = step_tables.sections(session.records)
    assert "### Steps" in text and "### Parts of a step, ms" in text and DEFAULT in text


def test_a_step_waits_longer_for_the_loader_than_for_a_cached_batch(session, workload, rank_info):
    benchmark.compare_loading(session, workload, rank_info)
    recorded = {record.provider: record for record in session.records}
    assert list(recorded) == [CACHED, SHARDS] and recorded[SHARDS].failure is None
    assert recorded[SHARDS].figures["wait_ms"] > recorded[CACHED].figures["wait_ms"]
    assert recorded[SHARDS].what == LOADING and recorded[SHARDS].shape["engine"] == DEFAULT


@pytest.mark.multi_rank
def test_two_ranks_are_compared_in_separate_processes(folder, workload):
    comparison = compare_on_ranks(folder, torch.device("cpu"), quick=True, limit_s=300)
    assert list(comparison.rounds) == [DDP, *ZERO]
    assert not [result for result in comparison.rounds.values() if isinstance(result, Failure)]
    measure.check_losses(comparison.losses, DDP, workload.precision)
    # Each rank has its share of the loss of a global batch.
    assert 0.2 < comparison.losses[DDP][0] < 0.8


def test_ranks_over_their_time_limit_are_stopped(folder):
    with pytest.raises(RuntimeError, match=r"ranks exited with \[124, 124\]"):
        compare_on_ranks(folder, torch.device("cpu"), quick=True, limit_s=0.1)


def test_an_engine_that_raises_drops_out_and_the_others_continue(workload, rank_info):
    plain = {"engine": "plain"}
    comparison = measure.compare(workload, {"wrong": plain | {"micro_batch_size": 3}, PLAIN: plain}, rank_info)
    assert isinstance(comparison.rounds["wrong"], Failure) and len(comparison.rounds[PLAIN]) == 2
    measure.check_losses(comparison.losses, "wrong", workload.precision)


def test_there_is_one_round_after_the_deadline(workload, rank_info):
    comparison = measure.compare(workload, {BARE: {}}, rank_info, deadline=time.monotonic() - 1)
    assert len(comparison.rounds[BARE]) == 1


def test_losses_that_differ_from_the_baseline_are_an_error(workload, rank_info):
    bare = Training({}, workload, rank_info)
    batch = workload.cached_batch(rank_info)
    losses = bare.warm_up(iter([batch] * 3), 3)
    assert losses[0] != losses[2]
    # These are the losses of an engine that never changes the weights.
    with pytest.raises(WrongResultError, match=r"lazy: loss .* in step 2, bare loop has"):
        measure.check_losses({BARE: losses, "lazy": losses[:2] + losses[:1]}, BARE, "fp32")
    with pytest.raises(WrongResultError):
        measure.check_losses({BARE: losses, "not a number": [math.nan] * 3}, BARE, "fp32")


def test_the_cached_batch_outlives_its_loader(workload, rank_info):
    first, second = workload.cached_batch(rank_info), workload.cached_batch(rank_info)
    assert first.key == second.key and torch.equal(first.source_view, second.source_view)
    assert first.source_view.data_ptr() != second.source_view.data_ptr()
    assert len(first.key) == workload.batch_size and first.context.total == second.context.total


def test_overheads_are_ratios_within_a_round():
    # The machine is half as fast in the second round, for all engines alike.
    ours = [step_round(step_s) for step_s in (1.1, 2.2, 1.2)]
    baseline = [step_round(step_s) for step_s in (1.0, 2.0, 1.0)]
    assert measure.overhead_percent(ours, baseline) == pytest.approx(10.0)
    figures = measure.part_figures([step_round(1.0, wait=0.1), step_round(2.0, wait=0.4), step_round(1.0, wait=0.1)])
    assert figures["wait_ms"] == 100.0 and figures["wait_percent"] == 10.0


def test_mfu_and_memory_are_recorded_on_a_gpu(session, workload, monkeypatch):
    monkeypatch.setattr("iwm_fast.monitoring.throughput.peak_flops", lambda device, precision: (1e12, "card"))
    comparison = Comparison({BARE: [step_round(0.004)]}, {}, {BARE: 2_000_000_000})
    gpu = distributed.RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cuda", 0))
    case = benchmark.Case(STEP, workload.shape(1), workload.precision)
    measure.record(session, workload, case, comparison, baseline_of=benchmark.baseline_of, rank_info=gpu)
    (record,) = session.records
    # 4 images in 4 ms are 1000 images per second.
    expected = 100 * 1000 * measure.build_throughput_meter(workload.config(), gpu).flops_per_image / 1e12
    assert record.figures["mfu_percent"] == pytest.approx(expected, abs=0.01) and record.figures["memory_gb"] == 2.0
    assert "card with fp32" in step_tables.speeds(session.records)


def test_a_gpu_adds_engines_with_fused_kernels_and_compilation(workload, folder):
    gpu = build_workload(folder, torch.device("cuda", 0), quick=False)
    names = set(engine_configs(gpu))
    assert {BARE + FUSED, PLAIN, DEFAULT + FUSED, DEFAULT + FUSED + COMPILED, ZERO[3] + FUSED} <= names
    assert engine_configs(gpu)[benchmark.fastest_engine(gpu)]["compile"] and gpu.name == BASE
    assert gpu.model == ModelConfig(predictor=dataclasses.replace(ModelConfig().predictor, depth=18))
    assert not any(FUSED in name for name in engine_configs(workload))
    assert {benchmark.baseline_of(name) for name in names} <= names


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
        record(DEFAULT + FUSED, 2500, teacher_update_percent=1.0),
        record(DEFAULT, 1500, teacher_update_percent=0.5),
        record(BARE + FUSED, 2600, teacher_update_percent=0.5),
        record(CACHED, 2500, what=LOADING, wait_percent=0.0),
        record(SHARDS, 2400, what=LOADING, wait_percent=0.4),
    ]
    assert measured(on_gpu)[2:] == ["2500.00", "1.00", "96.00", "0.40"]


def test_the_command_writes_records_and_prints_goals(folder, tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    assert benchmark.main(["--quick", "--only", "loader", "--data", str(folder), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "DeepSpeed ZeRO-1 over the bare loop" in printed and "not yet measured" in printed
    recorded = records.read(out)
    assert [record.provider for record in recorded] == [CACHED, SHARDS]
    assert json.loads(out.read_text().splitlines()[0])["machine"]["deepspeed"]
    text = report.render([], [], recorded)
    assert "## " in text and "one cached batch" in text
    gc.collect()


def test_the_command_reports_skipped_sections(folder, tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    assert benchmark.main(["--quick", "--limit-s", "-1", "--data", str(folder), "--out", str(out)]) == 0
    assert "skipped: engines" in capsys.readouterr().out and not out.exists()
