"""All sections of the data pipeline's benchmark with small images on a CPU, and the checks before timing."""

import dataclasses
import gc
import io
import os
from itertools import cycle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness import photograph_shards
from benchmarks.harness.interleave import Stream, StreamBudget
from benchmarks.harness.photograph_shards import PhotographShards
from benchmarks.harness.session import Session, WrongResultError
from benchmarks.harness.timing import QUICK
from benchmarks.pipelines import (
    __main__ as benchmark,
)
from benchmarks.pipelines import (
    action_log,
    checks,
    dataset_opening,
    loader_memory,
    report,
    shuffle_quality,
    smaller_shards,
    stages,
)
from benchmarks.pipelines.report import DALI_VIEWS, LOGGED, OURS, STAGES, TORCH_LOADER, TORCHVISION, VIEWS
from benchmarks.pipelines.shuffle_quality import SortedShards
from benchmarks.pipelines.streams import Workload, loader_stream, reader_stream, stage_stream
from iwm_fast.pipelines.storage.shard_set import find_shards, open_shards
from iwm_fast.pipelines.transforms.composition import ViewConfig

SMALL = PhotographShards(num_shards=3, samples_per_shard=8, width=80, height=60)
ONCE = StreamBudget(rounds=1, seconds=0.0, min_batches=1)


# The webdataset library leaves closing its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def _collect_open_files():
    yield
    gc.collect()


@pytest.fixture(scope="module")
def workload(tmp_path_factory) -> Workload:
    return Workload(
        folder=tmp_path_factory.mktemp("benchmarks"),
        photographs=SMALL,
        views=ViewConfig(size=32),
        batch_size=2,
        threads=1,
        device=torch.device("cpu"),
        budget=ONCE,
    )


@pytest.fixture
def session() -> Session:
    return Session({"cores": 2, "run": "2026-01-01"}, budget=QUICK, device="cpu")


def single_record(session):
    (record,) = session.records
    return record


def stream_of(batches) -> Stream:
    return Stream(lambda: (batch for batch in batches), len)


def test_photographs_have_the_requested_size_and_are_written_once(workload):
    shards = workload.shards
    assert shards.num_samples == 24 and len({shards.key(sample) for sample in range(24)}) == 24
    images = checks.first_batch(reader_stream(dataclasses.replace(workload, batch_size=24)))
    assert len({image.tobytes() for image in images}) == 24
    with Image.open(io.BytesIO(images[0].tobytes())) as image:
        assert image.size == (80, 60)
    before = [Path(shard.path).stat().st_mtime_ns for shard in shards.shards]
    SMALL.write(workload.folder)
    assert [Path(shard.path).stat().st_mtime_ns for shard in shards.shards] == before


def test_evicted_files_are_not_in_the_page_cache(workload):
    paths = find_shards(workload.pattern)
    photograph_shards.load_into_page_cache(workload.pattern)
    assert [photograph_shards.page_cache_share(path) for path in paths] == [1.0] * 3
    if os.major(os.stat(paths[0]).st_dev) == 0:
        pytest.skip("the temporary folder is not on a disk")
    assert photograph_shards.evict_from_page_cache(paths) == 0.0
    assert [photograph_shards.page_cache_share(path) for path in paths] == [0.0] * 3


def test_all_streams_are_checked_timed_and_recorded(session, workload):
    stages.run(session, workload)
    assert [record.failure for record in session.records if record.failure] == []
    timed = [record for record in session.records if record.what in STAGES]
    assert [(record.what, record.provider) for record in timed if record.shape["from"] == "memory"] == list(
        stages.all_streams(workload)
    )
    views = {record.provider for record in timed if record.what == VIEWS}
    assert {OURS, LOGGED, TORCH_LOADER, DALI_VIEWS} <= views and sum(
        name.startswith(TORCHVISION) for name in views
    ) == 3
    cold = [record for record in timed if record.shape["from"] == "disk"]
    assert len(cold) == 4 and all("share_left_in_memory" in record.figures for record in cold)
    assert all(record.figures["images_per_s"] > 0 and record.repeats == 1 for record in timed)
    assert "webdataset + torchvision, Pillow" in report.streams(session.records)
    assert all(report.cpu_ratio(name)(session.records) for name in (TORCHVISION, DALI_VIEWS))


def test_a_reader_that_repeats_images_is_an_error(workload):
    with reader_stream(workload).open() as batches:
        images = [next(batches) for _ in range(12)]
    complete, repeating = stream_of(images), stream_of(cycle(images[:6]))
    checks.check_readers({OURS: complete, "peer": stream_of(images[::-1])}, 24)
    with pytest.raises(WrongResultError, match="peer does not read every image exactly once; 12 were repeated"):
        checks.check_readers({OURS: complete, "peer": repeating}, 24)
    with pytest.raises(WrongResultError, match="ours does not"):
        checks.check_readers({OURS: repeating, "peer": repeating}, 24)


def test_views_that_differ_from_the_twins_are_an_error(workload):
    ours, twin = (checks.first_batch(loader_stream(workload, name)) for name in ("dali", "torch"))
    assert checks.check_views(ours, twin)["mean_difference"] < 1
    brighter = dataclasses.replace(ours, target_view=ours.target_view + 0.1)
    with pytest.raises(WrongResultError, match="differ from its twin's by"):
        checks.check_views(brighter, twin)
    reordered = dataclasses.replace(ours, key=ours.key[::-1])
    with pytest.raises(WrongResultError, match="different samples"):
        checks.check_views(reordered, twin)


@pytest.mark.parametrize("wrong", ["one view", "small", "bytes", "unnormalised", "twice"])
def test_views_that_take_less_work_are_an_error(workload, wrong):
    source, target = torch.randn(2, 2, 3, 32, 32).unbind()
    views = {
        "one view": [source],
        "small": [source[..., :16], target[..., :16]],
        "bytes": [source.byte(), target.byte()],
        "unnormalised": [source.sigmoid(), target.sigmoid()],
        "twice": [source, source],
    }
    checks.check_shapes(stream_of([[source, target]]), "peer", workload)
    with pytest.raises(WrongResultError, match="peer"):
        checks.check_shapes(stream_of([views[wrong]]), "peer", workload)


def test_a_stage_that_decodes_less_is_an_error(workload):
    checks.check_stage("decode", stage_stream(workload, "decode"), workload)
    with pytest.raises(WrongResultError, match="decode: 2 images of"):
        checks.check_stage("decode", stage_stream(workload, "crop"), workload)


def test_the_decoder_sweep_is_skipped_without_a_gpu(session, workload):
    stages.sweep_decoder(session, workload)
    assert session.records == [] and "no GPU" in session.skipped[0]


def test_the_cost_of_a_log_row_is_recorded(session, workload):
    action_log.run(session, workload, num_rows=63)
    figures = single_record(session).figures
    assert figures["rows"] == 64 and figures["bytes_per_image"] > 50 and figures["cpu_us_per_image"] > 0


def test_sorted_samples_mix_worst_and_a_full_shuffle_mixes_as_expected():
    layout = SortedShards(num_shards=8, samples_per_shard=64, batch_size=64)
    ordered = np.stack([np.arange(512)] * 2)
    assert shuffle_quality.measure_mixing(ordered, layout) == (1.0, 1.0)
    generator = np.random.default_rng(0)
    shards, pairs = shuffle_quality.measure_mixing(np.stack([generator.permutation(512) for _ in range(2)]), layout)
    assert 7 < shards < 8 and pairs == pytest.approx(63 / 511, rel=0.2)


def test_a_wider_window_mixes_better_and_reads_from_more_files(session, workload):
    shuffle_quality.run(session, workload, SortedShards(num_shards=8, samples_per_shard=16, batch_size=16))
    figures = {record.provider: record.figures for record in session.records}
    narrow, wide = figures["ours, window 1"], figures["ours, window 8"]
    ours = [f"ours, window {window}" for window in (1, 4, 8)]
    assert list(figures) == [*ours, "DALI webdataset", "webdataset library"]
    assert narrow["effective_shards"] == 1 and wide["of_full_shuffle"] > 0.9
    assert narrow["pairs_again"] > 2 * wide["pairs_again"] and narrow["files"] < wide["files"] == 8


def test_an_order_that_loses_a_sample_is_an_error():
    layout = SortedShards(num_shards=2, samples_per_shard=4, batch_size=4)
    incomplete = shuffle_quality.SampleSequence(np.zeros((2, 8), int), 1, 0)
    with pytest.raises(WrongResultError, match="does not contain every sample exactly once"):
        shuffle_quality.check("peer", incomplete, layout)


def test_memory_is_measured_in_a_separate_process(session, workload):
    loader_memory.run(session, workload, num_batches=8, settled=3)
    figures = single_record(session).figures
    assert figures["batches"] == 8 and figures["settled"] == 3 and figures["last_mb"] > 50


def test_memory_growth_is_counted_after_the_warm_up():
    resident = [50.0, 100.0, *(100 + 0.1 * batch for batch in range(1, 11))]
    figures = loader_memory.memory_figures(resident, settled=2)
    assert figures["growth_percent"] == pytest.approx(1.0)
    assert figures["slope_bytes_per_batch"] == pytest.approx(100_000) and figures["batches"] == 12


def test_views_from_smaller_shards_are_timed_beside_those_from_the_original_ones(session, workload, monkeypatch):
    # One process, because others import torch first.
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    smaller_shards.run(session, workload, sizes={(160, 120): 64})
    before, after = session.records
    assert [record.shape["shards"] for record in (before, after)] == ["before", "after"]
    assert before.figures["kb_per_image"] > 2 * after.figures["kb_per_image"] > 0
    assert all(record.figures["images_per_s"] > 0 for record in session.records)
    with pytest.raises(WrongResultError, match="not all images are resized"):
        smaller_shards.run(session, workload, sizes={(160, 120): 120})


def test_the_command_reports_skipped_sections_and_goals(tmp_path, capsys):
    assert benchmark.main(["--only", "sweep", "--data", str(tmp_path), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "two views: CPU time of the fastest webdataset" in printed and "not yet measured" in printed
    assert torch.cuda.is_available() or "skipped: decoder sweep" in printed
    assert benchmark.main(["--limit-s", "-1", "--data", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert "skipped: streams" in capsys.readouterr().out
    assert list(tmp_path.glob("*.jsonl")) == []


def test_data_sets_of_several_sizes_are_opened_in_a_process_and_on_ranks(session, workload, tmp_path):
    workload = dataclasses.replace(workload, folder=tmp_path)
    dataset_opening.run(session, workload, (3, 5), samples_per_shard=4, num_sources=2, num_ranks=2)
    (here,) = (record for record in session.records if record.what == report.OPENING)
    assert here.shape == {"shards": 3, "samples": 12} and here.repeats == 5 and here.median_ms > 0
    folder = tmp_path / "dataset-3x4"
    assert len(list(folder.glob("*.tar.index"))) == 3 and open_shards(str(folder)).num_samples == 12
    opened = [record for record in session.records if record.what == report.OPENING_ON_RANKS]
    assert [record.shape["samples"] for record in opened] == [12, 20]
    assert all(record.figures["private_mb"] > 0 and record.median_ms > 0 for record in opened)
    assert "Each further million of samples takes" in report.sections(session.records)
    assert report.speedup_of_processes(session.records) > 0
