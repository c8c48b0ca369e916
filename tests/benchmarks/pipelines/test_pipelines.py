"""Every section of the data line's benchmarks in small, on a CPU, and what they refuse to time."""

import dataclasses
import gc
import io
import os
from itertools import cycle, repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.harness import photograph_shards
from benchmarks.harness.interleave import Stream, Turns
from benchmarks.harness.photograph_shards import PhotographShards
from benchmarks.harness.session import Session, WrongResultError
from benchmarks.harness.timing import QUICK
from benchmarks.pipelines import (
    __main__ as benchmark,
)
from benchmarks.pipelines import (
    action_log,
    checks,
    dali_conditionals,
    loader_memory,
    report,
    shuffle_quality,
    stages,
    startup,
)
from benchmarks.pipelines.report import LOGGED, OURS, PEER, TASKS, TWIN, VIEWS
from benchmarks.pipelines.shuffle_quality import Set
from benchmarks.pipelines.streams import Workload, loader_stream, reader_stream, stage_stream
from iwm_fast.pipelines.config import ViewConfig
from iwm_fast.pipelines.storage.shard_set import find_shards, open_shards

SMALL = PhotographShards(num_shards=3, samples_per_shard=8, width=80, height=60)
ONCE = Turns(rounds=1, seconds=0.0, fewest=1)


# the webdataset library leaves closing its files to chance
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def _files_left_open_are_closed_here():
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
        turns=ONCE,
    )


@pytest.fixture
def session() -> Session:
    return Session({"cores": 2, "run": "2026-01-01"}, effort=QUICK, device="cpu")


def one(session):
    (record,) = session.records
    return record


def stream_of(batches) -> Stream:
    return Stream(lambda: (batch for batch in batches), len)


def test_photographs_have_the_size_they_should_and_are_written_once(workload):
    shards = workload.shards
    assert shards.num_samples == 24 and len({shards.key(sample) for sample in range(24)}) == 24
    images = checks.first_batch(reader_stream(dataclasses.replace(workload, batch_size=24)))
    assert len({image.tobytes() for image in images}) == 24
    with Image.open(io.BytesIO(images[0].tobytes())) as image:
        assert image.size == (80, 60)
    before = [Path(shard.path).stat().st_mtime_ns for shard in shards.shards]
    SMALL.write(workload.folder)
    assert [Path(shard.path).stat().st_mtime_ns for shard in shards.shards] == before


def test_what_the_kernel_forgot_is_seen_to_be_gone(workload):
    paths = find_shards(workload.pattern)
    photograph_shards.read_into_memory(workload.pattern)
    assert [photograph_shards.share_in_memory(path) for path in paths] == [1.0] * 3
    if os.major(os.stat(paths[0]).st_dev) == 0:
        pytest.skip("the temporary folder lies on no disk")
    assert photograph_shards.drop_from_memory(paths) == 0.0
    assert [photograph_shards.share_in_memory(path) for path in paths] == [0.0] * 3


def test_every_stream_is_checked_timed_and_written_down(session, workload):
    stages.run(session, workload)
    assert [record.failure for record in session.records if record.failure] == []
    timed = [record for record in session.records if record.what in TASKS]
    assert [(record.what, record.provider) for record in timed if record.shape["from"] == "memory"] == list(
        stages.warm_streams(workload)
    )
    views = {record.provider for record in timed if record.what == VIEWS}
    assert {OURS, LOGGED, TWIN} <= views and sum(name.startswith(PEER) for name in views) == 3
    cold = [record for record in timed if record.shape["from"] == "disk"]
    assert len(cold) == 4 and all("share_left_in_memory" in record.figures for record in cold)
    assert all(record.figures["images_per_s"] > 0 and record.repeats == 1 for record in timed)
    assert "webdataset + torchvision, Pillow" in report.streams(session.records)
    assert report.over_peer(session.records)


def test_a_reader_that_repeats_itself_is_refused(workload):
    with reader_stream(workload).open() as batches:
        images = [next(batches) for _ in range(12)]
    whole, lazy = stream_of(images), stream_of(cycle(images[:6]))
    checks.check_readers({OURS: whole, "peer": stream_of(images[::-1])}, 24)
    with pytest.raises(WrongResultError, match="peer does not read every image once; 12 came more than once"):
        checks.check_readers({OURS: whole, "peer": lazy}, 24)
    with pytest.raises(WrongResultError, match="ours does not"):
        checks.check_readers({OURS: lazy, "peer": lazy}, 24)


def test_views_that_differ_from_the_twins_are_refused(workload):
    ours, twin = (checks.first_batch(loader_stream(workload, name)) for name in ("dali", "torch"))
    assert checks.check_views(ours, twin)["mean_difference"] < 1
    brighter = dataclasses.replace(ours, target_view=ours.target_view + 0.1)
    with pytest.raises(WrongResultError, match="differ from its twin's by"):
        checks.check_views(brighter, twin)
    other = dataclasses.replace(ours, key=ours.key[::-1])
    with pytest.raises(WrongResultError, match="other samples"):
        checks.check_views(other, twin)


@pytest.mark.parametrize("wrong", ["one view", "small", "bytes", "unnormalised", "twice"])
def test_views_that_are_less_work_are_refused(workload, wrong):
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


def test_a_stage_that_decodes_less_is_refused(workload):
    checks.check_stage("decode", stage_stream(workload, "decode"), workload)
    with pytest.raises(WrongResultError, match="decode: 2 images of"):
        checks.check_stage("decode", stage_stream(workload, "crop"), workload)


def test_neutral_parameters_make_the_same_pixels_and_are_timed(session, workload):
    dali_conditionals.run(session, dataclasses.replace(workload, batch_size=8))
    assert [record.provider for record in session.records] == ["ours", "always, with neutral parameters"]
    assert all(record.failure is None for record in session.records)
    both = list(repeat([np.zeros(3)] * 2, 2)), list(repeat([np.ones(3)] * 2, 2))
    with pytest.raises(WrongResultError, match="other pixels"):
        dali_conditionals.check({"a": stream_of(both[0]), "b": stream_of(both[1])}, np.asarray)


def test_without_a_gpu_its_decoder_is_left_out(session, workload):
    stages.sweep_decoder(session, workload)
    assert session.records == [] and "no GPU" in session.left_out[0]


def test_the_log_tells_what_a_row_costs(session, workload):
    action_log.run(session, workload, num_rows=63)
    figures = one(session).figures
    assert figures["rows"] == 64 and figures["bytes_per_image"] > 50 and figures["cpu_us_per_image"] > 0


def test_mixing_is_one_for_a_full_shuffle_and_as_bad_as_it_can_be_in_order():
    chosen = Set(num_shards=8, samples_per_shard=64, batch_size=64)
    ordered = np.stack([np.arange(512)] * 2)
    assert shuffle_quality.mixing(ordered, chosen) == (1.0, 1.0)
    generator = np.random.default_rng(0)
    shards, pairs = shuffle_quality.mixing(np.stack([generator.permutation(512) for _ in range(2)]), chosen)
    assert 7 < shards < 8 and pairs == pytest.approx(63 / 511, rel=0.2)


def test_a_wider_window_mixes_better_and_reads_from_more_files(session, workload):
    shuffle_quality.run(session, workload, Set(num_shards=8, samples_per_shard=16, batch_size=16))
    found = {record.provider: record.figures for record in session.records}
    narrow, wide = found["ours, window 1"], found["ours, window 8"]
    assert list(found) == [f"ours, window {window}" for window in (1, 4, 8)] + ["DALI webdataset", "webdataset library"]
    assert narrow["effective_shards"] == 1 and wide["of_full_shuffle"] > 0.9
    assert narrow["pairs_again"] > 2 * wide["pairs_again"] and narrow["files"] < wide["files"] == 8


def test_an_order_that_loses_a_sample_is_refused():
    chosen = Set(num_shards=2, samples_per_shard=4, batch_size=4)
    lost = shuffle_quality.Order(np.zeros((2, 8), int), 1, 0)
    with pytest.raises(WrongResultError, match="does not hold every sample once"):
        shuffle_quality.check("peer", lost, chosen)


def test_memory_is_watched_in_a_process_of_its_own(session, workload):
    loader_memory.run(session, workload, num_batches=8, settled=3)
    figures = one(session).figures
    assert figures["batches"] == 8 and figures["settled"] == 3 and figures["last_mb"] > 50


def test_growth_is_counted_from_where_buffers_have_settled():
    resident = [50.0, 100.0, *(100 + 0.1 * batch for batch in range(1, 11))]
    figures = loader_memory.figures_of(resident, settled=2)
    assert figures["growth_percent"] == pytest.approx(1.0)
    assert figures["slope_bytes_per_batch"] == pytest.approx(100_000) and figures["batches"] == 12


def test_opening_is_timed_with_indexes_that_were_kept(session, workload):
    startup.run(session, workload, num_shards=3, samples_per_shard=5)
    record = one(session)
    assert record.shape == {"shards": 3, "samples": 15} and record.repeats == 5 and record.median_ms > 0
    (folder,) = workload.folder.glob("linked-*")
    assert len(list(folder.glob("*.index"))) == 3 and open_shards(str(folder)).num_samples == 15


def test_the_command_says_what_it_left_out_and_what_is_still_to_be_reached(tmp_path, capsys):
    assert benchmark.main(["--only", "sweep", "--data", str(tmp_path), "--out", str(tmp_path / "x.jsonl")]) == 0
    printed = capsys.readouterr().out
    assert "two views: ours / the fastest webdataset" in printed and "not yet measured" in printed
    assert torch.cuda.is_available() or "left out: decoder sweep" in printed
    assert benchmark.main(["--limit-s", "-1", "--data", str(tmp_path), "--out", str(tmp_path / "x.jsonl")]) == 0
    assert "left out: streams" in capsys.readouterr().out
    assert benchmark.parse(["--memory"]).only == "memory"
    assert not (tmp_path / "x.jsonl").exists()
