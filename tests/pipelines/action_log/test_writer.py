"""The action log has one complete row for every sample that training received, and is written in the background."""

import functools
import os
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fixtures.tar_files import encode, photograph, write_tar
from iwm_fast.pipelines.action_log.files import ActionLogError, list_log_files, read_rows, read_step, truncate_from
from iwm_fast.pipelines.action_log.schema import LogMetadata, column, read_draws, read_metadata
from iwm_fast.pipelines.action_log.writer import ActionLog
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import LoaderConfig, MaskConfig
from iwm_fast.pipelines.loader import build_loader
from iwm_fast.pipelines.sampling.batch_plan import SampleStream, TrainingPlan
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.operations.crop import Crop
from iwm_fast.pipelines.transforms.operations.flip import Flip

GLOBAL_BATCH, MICRO_BATCH, STEPS = 16, 4, 7
VIEWS = ViewConfig(size=32, crop=Crop(source_scale=(0.3, 0.9)), flip=Flip(source_probability=0.5))


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    """Three shards of eight photographs, one of which is truncated."""
    folder = tmp_path_factory.mktemp("shards")
    pixels = photograph("chelsea.png")
    images = [encode(pixels[number : number + 64, 2 * number : 2 * number + 80]) for number in range(24)]
    images[7] = images[7][:300]
    for shard in range(3):
        members = []
        for number in range(8 * shard, 8 * shard + 8):
            members += [(f"{number:02}.jpg", images[number]), (f"{number:02}.cls", str(number % 5).encode())]
        write_tar(folder / f"{shard}.tar", members)
    return open_shards(str(folder))


def metadata(shards: ShardSet, **changes) -> LogMetadata:
    fields = {
        "views": VIEWS, "mask": MaskConfig(), "seed": 0, "grid": 4, "global_batch_size": GLOBAL_BATCH,
        "shards": "shards/*.tar", "shards_digest": shards.content_digest,
    }  # fmt: skip
    return LogMetadata(**fields | changes)


def take(shards: ShardSet, steps: range, *, rank: int = 0, world_size: int = 1, backend: str = "torch") -> list[Batch]:
    """Return the micro-batches of four images that a rank receives in these steps."""
    accumulation = GLOBAL_BATCH // (MICRO_BATCH * world_size)
    return _first_steps(shards, rank, world_size, backend)[steps.start * accumulation : steps.stop * accumulation]


@functools.cache
def _first_steps(shards: ShardSet, rank: int, world_size: int, backend: str) -> list[Batch]:
    stream = SampleStream(
        order=SampleOrder([len(shard.keys) for shard in shards.shards], 0, 3),
        global_batch_size=GLOBAL_BATCH, micro_batch_size=MICRO_BATCH, rank=rank, world_size=world_size,
    )  # fmt: skip
    plan = TrainingPlan(views=VIEWS, mask=MaskConfig(), seed=0, grid=4, stream=stream)
    settings = LoaderConfig(loader=backend, reader_threads=1, loader_threads=1, prefetch=1, max_bad_samples=5.0)
    loader = build_loader(plan, shards, settings, torch.device("cpu"))
    try:
        return [next(loader) for _ in range(STEPS * GLOBAL_BATCH // (MICRO_BATCH * world_size))]
    finally:
        loader.close()


def open_log(folder: Path, shards: ShardSet, rank: int = 0, **settings) -> ActionLog:
    return ActionLog(folder, **{"head": metadata(shards), "shards": shards, "rank": rank} | settings)


def add(log: ActionLog, batches: list[Batch]) -> None:
    for batch in batches:
        assert log.add(batch) is batch


def write(folder: Path, shards: ShardSet, steps: range, *, world_size: int = 1, **settings) -> None:
    """Log these steps like a run with `world_size` ranks, each of which has its log."""
    for rank in range(world_size):
        log = open_log(folder, shards, rank, **settings)
        add(log, take(shards, steps, rank=rank, world_size=world_size))
        with closing(log):
            log.publish()


def names(folder: Path) -> list[str]:
    return [file.path.name for file in list_log_files(folder)]


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_rows_contain_the_values_of_the_batches(tmp_path, shards, backend):
    batches = take(shards, range(2, 5), backend=backend)
    log = open_log(tmp_path / "actions", shards, rank=3)
    add(log, batches)
    log.publish()
    log.close()
    rows = read_rows(tmp_path / "actions", 2, 5)
    assert read_metadata(rows.schema) == metadata(shards)
    assert column(rows, "step").tolist() == np.repeat([2, 3, 4], GLOBAL_BATCH).tolist()
    for name in ("slot", "sample", "planned", "label", "crop_window", "source_window", "action"):
        field = "scheduled_sample" if name == "planned" else name
        expected = torch.cat([getattr(batch, field) for batch in batches]).numpy()
        assert np.array_equal(column(rows, name), expected), name
    assert rows.column("key").to_pylist() == [key for batch in batches for key in batch.key]
    shard, _ = shards.locate(column(rows, "sample"))
    assert rows.column("shard").to_pylist() == [shards.shards[number].path for number in shard]
    assert_same_draws(read_draws(rows, VIEWS), [batch.draws for batch in batches])
    assert (column(rows, "sample") != column(rows, "planned")).sum() == 2, (
        "the truncated image comes twice in 48 samples"
    )
    assert (column(rows, "source_window") != column(rows, "crop_window")).any()


def assert_same_draws(logged, drawn: list) -> None:
    values_of = dict if isinstance(logged, dict) else vars
    for name, value in values_of(logged).items():
        expected_parts = [values_of(draws)[name] for draws in drawn]
        if isinstance(value, np.ndarray):
            expected = np.concatenate(expected_parts)
            assert value.dtype == expected.dtype and np.array_equal(value, expected), name
        else:
            assert_same_draws(value, expected_parts)


def test_any_parquet_reader_can_read_the_folder(tmp_path, shards):
    write(tmp_path, shards, range(3), world_size=2)
    (tmp_path / ".unfinished-rank-001.parquet").write_bytes(b"PAR1")
    table = pq.read_table(tmp_path)
    assert table.num_rows == 3 * GLOBAL_BATCH
    assert table.schema.field("action").type == pa.list_(pa.float32(), len(VIEWS.entries))
    assert str(VIEWS.entries[-1]).encode() in table.schema.metadata[b"action_log"]


def test_rows_are_written_in_the_background_until_the_disk_hangs(tmp_path, shards):
    # Opening a pipe for writing waits for a reader, like a disk that hangs until the test releases it.
    pipe = tmp_path / ".unfinished-rank-000.parquet"
    os.mkfifo(pipe)
    batches, added = take(shards, range(2)), []
    log = open_log(tmp_path, shards, group_rows=4)
    training = threading.Thread(target=lambda: added.extend(log.add(batch) for batch in batches * 4), daemon=True)
    drain = threading.Thread(target=pipe.read_bytes, daemon=True)
    training.start()
    try:
        wait_until(lambda: len(added) == 2)
        time.sleep(0.2)
        # Groups have one batch: the first hangs, the second waits, and the third is not accepted.
        assert len(added) == 2 and training.is_alive()
    finally:
        drain.start()
        training.join(20)
    assert len(added) == len(batches) * 4
    with pytest.raises(OSError) as caught:  # a pipe cannot be synced to disk
        log.publish()
    assert "output.action_log=false" in caught.value.__notes__[0]
    log.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("action-log")]


def test_a_file_is_visible_only_when_it_is_complete(tmp_path, shards):
    log = open_log(tmp_path, shards, group_rows=4)
    add(log, take(shards, range(2)))
    assert names(tmp_path) == []
    log.publish()
    assert names(tmp_path) == ["step-00000000-00000002-rank-000.parquet"]
    log.publish()
    log.close()
    assert len(os.listdir(tmp_path)) == 1, "without rows there is no file"


@pytest.mark.parametrize("group_rows", [1, 24, 1000])
def test_long_files_end_with_a_step(tmp_path, shards, group_rows):
    write(tmp_path, shards, range(7), group_rows=group_rows, file_rows=40)
    assert names(tmp_path) == [f"step-{first:08}-{end:08}-rank-000.parquet" for first, end in ((0, 3), (3, 6), (6, 7))]
    assert read_rows(tmp_path, 0, 7).num_rows == 7 * GLOBAL_BATCH


@pytest.mark.parametrize("ranks", [(1, 1), (2, 4), (4, 1)])
def test_a_resumed_run_has_the_rows_of_an_uninterrupted_run(tmp_path, shards, ranks):
    write(tmp_path / "straight", shards, range(7))
    restarted = tmp_path / "restarted"
    write(restarted, shards, range(3), world_size=ranks[0])
    write(restarted, shards, range(3, 6), world_size=ranks[0])
    # The process dies while it writes, and the run resumes from the checkpoint of step 3, not from that of step 6.
    (restarted / ".unfinished-rank-000.parquet").write_bytes(b"PAR1")
    truncate_from(restarted, 3)
    assert {file.end_step for file in list_log_files(restarted)} == {3} and len(os.listdir(restarted)) == ranks[0]
    write(restarted, shards, range(3, 7), world_size=ranks[1])
    expected, actual = (read_rows(folder, 0, 7).drop_columns("rank") for folder in (tmp_path / "straight", restarted))
    assert actual.equals(expected)
    assert set(column(read_step(restarted, 6), "rank")) == set(range(ranks[1]))


def test_a_file_that_extends_past_the_checkpoint_is_truncated(tmp_path, shards):
    write(tmp_path, shards, range(6), world_size=2)
    rows = read_rows(tmp_path, 0, 6)
    truncate_from(tmp_path, 4)
    truncated = ["step-00000000-00000004-rank-000.parquet", "step-00000000-00000004-rank-001.parquet"]
    assert sorted(os.listdir(tmp_path)) == truncated
    assert read_rows(tmp_path, 0, 4).equals(rows.slice(0, 4 * GLOBAL_BATCH))
    # The process was killed after the rows were replaced and before the file was renamed.
    (tmp_path / truncated[0]).rename(tmp_path / "step-00000000-00000006-rank-000.parquet")
    truncate_from(tmp_path, 4)
    assert sorted(os.listdir(tmp_path)) == truncated and read_rows(tmp_path, 0, 4).num_rows == 4 * GLOBAL_BATCH
    truncate_from(tmp_path, 0)
    truncate_from(tmp_path / "absent", 0)
    assert os.listdir(tmp_path) == []


def test_missing_and_duplicate_rows_are_errors_that_name_step_and_slot(tmp_path, shards):
    with pytest.raises(ActionLogError, match=r"holds no action log; train with output\.action_log=true"):
        read_step(tmp_path, 0)
    write(tmp_path, shards, range(2), world_size=2)
    write(tmp_path, shards, range(4, 6), world_size=2)
    with pytest.raises(ActionLogError, match=r"step 3 is not in .*, which holds steps 0 \.\. 1, 4 \.\. 5"):
        read_step(tmp_path, 3)
    with pytest.raises(ActionLogError, match=r"32 rows are missing in .* 4 \.\. 5, the first is step 2, slot 0"):
        read_rows(tmp_path, 0, 6)
    (tmp_path / "step-00000004-00000006-rank-001.parquet").unlink()
    with pytest.raises(ActionLogError, match=r"8 rows are missing in .* the first is step 5, slot 4"):
        read_step(tmp_path, 5)
    write(tmp_path / "elsewhere", shards, range(1), world_size=2)
    list_log_files(tmp_path / "elsewhere")[0].path.rename(tmp_path / "step-00000000-00000001-rank-000.parquet")
    with pytest.raises(ActionLogError, match=r"8 rows occur twice in .* step 0, slot 0, in .*0001-.*0002-rank-000"):
        read_rows(tmp_path, 0, 2)


def test_a_damaged_file_is_named(tmp_path, shards):
    write(tmp_path, shards, range(3))
    (path,) = tmp_path.iterdir()
    os.truncate(path, path.stat().st_size - 20)
    with pytest.raises(ActionLogError, match=rf"{path.name} cannot be read .* move it away"):
        read_step(tmp_path, 1)


def test_steps_with_different_settings_can_only_be_read_separately(tmp_path, shards):
    write(tmp_path, shards, range(2))
    log = open_log(tmp_path, shards, head=metadata(shards, seed=1))
    add(log, take(shards, range(2, 3)))
    # A run that ends with an error also publishes the rows after its last checkpoint.
    log.close()
    assert (
        read_metadata(read_step(tmp_path, 1).schema).seed == 0
        and read_metadata(read_step(tmp_path, 2).schema).seed == 1
    )
    with pytest.raises(ActionLogError, match=r"step-00000002-00000003-rank-000.parquet .*other settings"):
        read_rows(tmp_path, 0, 3)


@pytest.mark.parametrize("is_open", [False, True])
def test_a_write_error_is_raised_and_published_files_remain(tmp_path, shards, is_open, caplog):
    folder = tmp_path / "actions"
    batches, log = take(shards, range(3)), open_log(folder, shards, group_rows=4)
    add(log, batches[:4])
    log.publish()
    if is_open:
        log.add(batches[4])
        wait_until((folder / ".unfinished-rank-000.parquet").exists)
    moved = folder.rename(tmp_path / "moved")
    log.add(batches[5])
    if not is_open:
        wait_until(lambda: log.failure is not None)
        with pytest.raises(FileNotFoundError):
            log.add(batches[6])
    for call in (log.publish, lambda: log.add(batches[8])):
        with pytest.raises(FileNotFoundError) as caught:
            call()
        (note,) = caught.value.__notes__
        assert str(folder) in note and "output.action_log=false" in note and "resume=auto" in note
    log.close()
    assert "lacks its last rows" in caplog.text and not folder.exists()
    assert names(moved) == ["step-00000000-00000001-rank-000.parquet"]
    assert read_step(moved, 0).num_rows == GLOBAL_BATCH


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_does_not_overwrite_another(tmp_path, shards):
    write(tmp_path, shards, range(2))
    (file,) = list_log_files(tmp_path)
    before = file.path.read_bytes()
    with pytest.raises(FileExistsError, match="check that no other run writes"):
        write(tmp_path, shards, range(2))
    assert os.listdir(tmp_path) == [file.path.name] and file.path.read_bytes() == before


def test_keys_that_are_not_valid_unicode_stay_readable(tmp_path, shards):
    image = encode(photograph("coffee.png")[:40, :50])
    odd = os.fsdecode(b"caf\xe9")
    write_tar(tmp_path / "odd.tar", [(f"{odd}{number}.jpg", image) for number in range(16)])
    odd_shards = open_shards(str(tmp_path / "odd.tar"))
    write(tmp_path / "actions", odd_shards, range(1))
    assert set(read_step(tmp_path / "actions", 0).column("key").to_pylist()) == {f"caf\\xe9{n}" for n in range(16)}
