"""The training step's benchmark in small, on a CPU, and the arithmetic behind its tables."""

import dataclasses
import gc
import json
import math
import time

import pytest
import torch

from benchmarks import report
from benchmarks.harness import records
from benchmarks.harness.records import Record
from benchmarks.harness.session import Session, WrongResultError
from benchmarks.harness.timing import QUICK, Failure
from benchmarks.train_step import __main__ as benchmark
from benchmarks.train_step import measure
from benchmarks.train_step import report as step_tables
from benchmarks.train_step.engines import Training, contestants_of
from benchmarks.train_step.measure import Comparison, StepTurn
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
from benchmarks.train_step.two_ranks import compare_on_ranks
from benchmarks.train_step.workload import build_workload
from iwm_fast.config.run import ModelConfig
from iwm_fast.monitoring.step_timer import PARTS
from iwm_fast.runtime import distributed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("benchmarks")


@pytest.fixture
def workload(folder):
    return build_workload(folder, torch.device("cpu"), is_quick=True)


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()
    gc.collect()


@pytest.fixture
def session() -> Session:
    return Session({"cores": 2, "run": "2026-01-01"}, effort=QUICK, device="cpu")


def turn(step_s: float, **parts: float) -> StepTurn:
    return StepTurn(step_s, dict.fromkeys(PARTS, 0.0) | parts)


def test_every_engine_steps_in_turns_and_is_compared_with_the_bare_loop(session, workload, rank_info):
    benchmark.engines(session, workload, rank_info)
    found = {record.provider: record for record in session.records}
    assert list(found) == [BARE, PLAIN, *ZERO] and not [one.failure for one in found.values() if one.failure]
    assert all(one.what == STEP and one.repeats == 2 and one.shape["ranks"] == 1 for one in found.values())
    assert found[DEFAULT].figures["over"] == BARE and "over_percent" not in found[BARE].figures
    for one in found.values():
        assert one.median_ms == pytest.approx(sum(one.figures[f"{part}_ms"] for part in PARTS), rel=0.2)
        assert one.figures["images_per_s"] == pytest.approx(4e3 / one.median_ms, rel=1e-3)
        assert 0 < one.figures["teacher_update_percent"] < 50 and one.figures["wait_ms"] < one.figures["forward_ms"]
    text = step_tables.sections(session.records)
    assert "### Steps" in text and "### Parts of a step, ms" in text and DEFAULT in text


def test_the_loader_makes_the_step_wait_and_a_cached_batch_does_not(session, workload, rank_info):
    benchmark.loading(session, workload, rank_info)
    found = {record.provider: record for record in session.records}
    assert list(found) == [CACHED, SHARDS] and found[SHARDS].failure is None
    assert found[SHARDS].figures["wait_ms"] > found[CACHED].figures["wait_ms"]
    assert found[SHARDS].what == LOADING and found[SHARDS].shape["engine"] == DEFAULT


@pytest.mark.multi_rank
def test_two_ranks_are_measured_in_processes_of_their_own(folder, workload):
    found = compare_on_ranks(folder, torch.device("cpu"), is_quick=True, limit_s=300)
    assert list(found.turns) == [DDP, *ZERO]
    assert not [result for result in found.turns.values() if isinstance(result, Failure)]
    measure.check_losses(found.losses, DDP, workload.precision)
    # each rank has its share of one global batch
    assert 0.2 < found.losses[DDP][0] < 0.8


def test_ranks_that_take_too_long_are_ended(folder):
    with pytest.raises(RuntimeError, match=r"ranks ended with \[124, 124\]"):
        compare_on_ranks(folder, torch.device("cpu"), is_quick=True, limit_s=0.1)


def test_one_that_raises_drops_out_and_the_others_go_on(workload, rank_info):
    plain = {"engine": "plain"}
    found = measure.compare(workload, {"wrong": plain | {"micro_batch_size": 3}, PLAIN: plain}, rank_info)
    assert isinstance(found.turns["wrong"], Failure) and len(found.turns[PLAIN]) == 2
    measure.check_losses(found.losses, "wrong", workload.precision)


def test_without_time_there_is_one_round(workload, rank_info):
    found = measure.compare(workload, {BARE: {}}, rank_info, deadline=time.monotonic() - 1)
    assert len(found.turns[BARE]) == 1


def test_one_that_trains_otherwise_is_refused(workload, rank_info):
    bare = Training({}, workload, rank_info)
    batch = workload.cached_batch(rank_info)
    losses = bare.warm_up(iter([batch] * 3), 3)
    assert losses[0] != losses[2]
    # as if the weights had never changed
    with pytest.raises(WrongResultError, match=r"lazy: loss .* in step 2 where bare loop has"):
        measure.check_losses({BARE: losses, "lazy": losses[:2] + losses[:1]}, BARE, "fp32")
    with pytest.raises(WrongResultError):
        measure.check_losses({BARE: losses, "not a number": [math.nan] * 3}, BARE, "fp32")


def test_the_cached_batch_outlives_its_loader(workload, rank_info):
    first, second = workload.cached_batch(rank_info), workload.cached_batch(rank_info)
    assert first.key == second.key and torch.equal(first.source_view, second.source_view)
    assert first.source_view.data_ptr() != second.source_view.data_ptr()
    assert len(first.key) == workload.batch_size and first.context.total == second.context.total


def test_overheads_are_ratios_within_a_round():
    # the machine is half as fast in the second round: nobody's fault
    ours, base = [turn(1.1), turn(2.2), turn(1.2)], [turn(1.0), turn(2.0), turn(1.0)]
    assert measure.over_percent(ours, base) == pytest.approx(10.0)
    figures = measure.part_figures([turn(1.0, wait=0.1), turn(2.0, wait=0.4), turn(1.0, wait=0.1)])
    assert figures["wait_ms"] == 100.0 and figures["wait_percent"] == 10.0


def test_a_gpus_share_of_its_peak_and_memory_are_noted(session, workload, monkeypatch):
    monkeypatch.setattr("iwm_fast.monitoring.throughput.peak_flops", lambda device, precision: (1e12, "card"))
    found = Comparison({BARE: [turn(0.004)]}, {}, {BARE: 2_000_000_000})
    gpu = distributed.RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cuda", 0))
    case = benchmark.Case(STEP, workload.shape(1), workload.precision)
    measure.note(session, workload, case, found, base_of=benchmark.base_of, rank_info=gpu)
    (record,) = session.records
    # 4 images in 4 ms
    wanted = 100 * 1000 * measure.build_throughput_meter(workload.config(), gpu).flops_per_image / 1e12
    assert record.figures["mfu_percent"] == pytest.approx(wanted, abs=0.01) and record.figures["memory_gb"] == 2.0
    assert "card with fp32" in step_tables.speeds(session.records)


def test_a_gpu_adds_fused_kernels_and_a_compiler_compiled_networks(workload, folder):
    gpu = build_workload(folder, torch.device("cuda", 0), is_quick=False)
    names = set(contestants_of(gpu))
    assert {BARE + FUSED, PLAIN, DEFAULT + FUSED, DEFAULT + FUSED + COMPILED, ZERO[3] + FUSED} <= names
    assert contestants_of(gpu)[benchmark.fastest(gpu)]["compile"] and gpu.name == BASE
    assert gpu.model == ModelConfig(predictor=dataclasses.replace(ModelConfig().predictor, depth=18))
    assert not any(FUSED in name for name in contestants_of(workload))
    assert {benchmark.base_of(name) for name in names} <= names


def record(provider, images_per_s, *, gpu: str | None = "NVIDIA H200", what=STEP, model=BASE, **figures):
    about = {"run": "2026-01-01", "cores": 2} | ({"gpu": gpu} if gpu else {})
    shape = {"model": model, "view": 224, "B": 256, "ranks": 1}
    figures = {"images_per_s": images_per_s, **figures}
    return Record(what=what, provider=provider, shape=shape, figures=figures, machine=about)


def measured(found) -> list[str]:
    return [goal.verdict(found)[1] for goal in step_tables.GOALS]


def test_goals_are_for_the_machines_and_networks_they_name():
    nothing = ["not yet measured"] * 6
    assert measured([]) == nothing
    # another card, and tiny networks
    assert measured([record(DEFAULT, 9999, gpu="NVIDIA H100"), record(DEFAULT, 9999, model="tiny")]) == nothing
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
    found = records.read(out)
    assert [one.provider for one in found] == [CACHED, SHARDS]
    assert json.loads(out.read_text().splitlines()[0])["machine"]["deepspeed"]
    assert "## " in report.render([], [], found) and "one cached batch" in report.render([], [], found)
    gc.collect()


def test_the_command_says_what_it_left_out(folder, tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    assert benchmark.main(["--quick", "--limit-s", "-1", "--data", str(folder), "--out", str(out)]) == 0
    assert "left out: engines" in capsys.readouterr().out and not out.exists()
