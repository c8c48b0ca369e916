"""Reading encoded images: the right bytes in the right order, a bounded number of files, and errors that are raised."""

from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from fixtures.tar_files import write_tar
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.reader import FileCache, Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards

NUM_SHARDS, PER_SHARD = 5, 8


def image_bytes(sample: int) -> bytes:
    return bytes([sample]) * (1000 + 37 * sample)


@pytest.fixture
def folder(tmp_path) -> Path:
    for shard in range(NUM_SHARDS):
        members = [(f"{position}.jpg", image_bytes(shard * PER_SHARD + position)) for position in range(PER_SHARD)]
        write_tar(tmp_path / f"{shard}.tar", members)
    return tmp_path


@pytest.fixture
def shards(folder) -> ShardSet:
    return open_shards(str(folder))


@pytest.mark.parametrize("num_threads", [1, 3, 64])
def test_images_are_returned_in_the_order_of_the_request(shards, num_threads):
    samples = np.random.default_rng(0).permutation(shards.num_samples).astype(np.int64)
    with Reader(shards, num_threads) as reader:
        images = reader.read(samples)
    assert [image.tobytes() for image in images] == [image_bytes(sample) for sample in samples.tolist()]
    assert all(image.dtype == np.uint8 for image in images)


def test_repeated_samples_are_read_twice_and_no_samples_give_no_images(shards):
    with Reader(shards, 2) as reader:
        assert [len(image) for image in reader.read(np.array([3, 3]))] == [len(image_bytes(3))] * 2
        assert reader.read(np.array([], np.int64)) == []


def test_several_batches_can_be_read_at_a_time(shards):
    batches = [np.arange(first, first + 4) for first in range(0, 40, 4)]
    with Reader(shards, 2) as reader:
        futures = [reader.submit(batch) for batch in batches]
        for batch, future in zip(batches, futures, strict=True):
            assert [image.tobytes() for image in future.result()] == [image_bytes(int(sample)) for sample in batch]


def test_remote_shards_give_the_same_bytes(folder, shards):
    with Reader(open_shards(f"file://{folder}"), 2) as reader:
        assert [image.tobytes() for image in reader.read(np.arange(40))] == [image_bytes(n) for n in range(40)]


@pytest.mark.parametrize("change", [-3000, 512])
def test_a_shard_whose_size_has_changed_is_reported_with_the_key(folder, shards, change):
    path = folder / "2.tar"
    path.write_bytes(path.read_bytes()[:change] if change < 0 else path.read_bytes() + bytes(change))
    with Reader(shards, 1) as reader:
        with pytest.raises(ShardError, match=r"has changed since it was indexed, from .*; restart") as caught:
            reader.submit(np.arange(shards.num_samples)).result()
        assert caught.value.shard == str(path) and caught.value.key == "0"
        # The reader can still be used for the other shards.
        assert len(reader.read(np.arange(8))) == 8


def test_a_shard_truncated_while_open_is_reported_with_the_key(folder, shards):
    path = folder / "2.tar"
    with Reader(shards, 3) as reader:
        reader.read(np.arange(16, 24))
        with path.open("r+b") as file:
            file.truncate(3000)
        assert reader.read(np.array([16]))[0].tobytes() == image_bytes(16)
        with pytest.raises(ShardError, match=r"changed since it was indexed: only .* remain.*; restart") as caught:
            reader.read(np.array([23]))
        assert caught.value.shard == str(path) and caught.value.key == "7"


def test_a_shard_removed_after_indexing_is_reported_with_its_path(folder, shards):
    (folder / "4.tar").unlink()
    with Reader(shards, 2) as reader, pytest.raises(FileNotFoundError) as caught:
        reader.read(np.array([0, 35]))
    assert any("sample '3'" in note and "4.tar" in note for note in caught.value.__notes__)


def test_errors_of_several_threads_raise_a_single_one(folder, shards, caplog):
    for shard in range(NUM_SHARDS):
        (folder / f"{shard}.tar").unlink()
    with Reader(shards, 8) as reader:
        for _ in range(20):
            with pytest.raises(FileNotFoundError):
                reader.read(np.arange(40))
    # concurrent.futures only logs an exception in a callback.
    assert caplog.records == []


def test_sample_numbers_outside_the_set_are_refused_on_submission(shards):
    with Reader(shards, 1) as reader, pytest.raises(IndexError, match="got 40"):
        reader.submit(np.array([40]))


def test_a_closed_reader_leaves_no_future_pending_and_accepts_no_request(shards):
    reader = Reader(shards, 1)
    futures = [reader.submit(np.tile(np.arange(40), 50)) for _ in range(20)]
    reader.close()
    assert all(future.done() for future in futures)
    assert isinstance(futures[-1].exception(), CancelledError)
    with pytest.raises(RuntimeError, match="shutdown"):
        reader.submit(np.array([0]))


def test_no_more_files_are_open_than_the_limit(shards):
    cache = FileCache(limit=2)
    files = []
    for shard in shards.shards:
        with cache.lease(shard.path) as file:
            files.append(file)
            assert len(cache._open) <= 2
    assert [file._descriptor >= 0 for file in files] == [False, False, False, True, True]
    cache.close()
    assert all(file._descriptor < 0 for file in files)


def test_the_least_recently_used_file_is_closed_first(shards):
    cache = FileCache(limit=2)
    paths = [shard.path for shard in shards.shards]
    for index in (0, 1, 0, 2):
        with cache.lease(paths[index]):
            pass
    assert list(cache._open) == [paths[0], paths[2]]
    cache.close()


def test_a_file_in_use_is_never_closed(shards):
    cache = FileCache(limit=1)
    paths = [shard.path for shard in shards.shards]
    with cache.lease(paths[0]) as first:
        for path in paths[1:]:
            with cache.lease(path):
                pass
        assert first.read_at(0, 5) == b"0.jpg"
    assert len(cache._open) == 1
    cache.close()


def test_threads_share_files_with_a_limit_of_one(shards):
    cache = FileCache(limit=1)
    paths = [shard.path for shard in shards.shards]

    def read(index: int) -> bytes:
        with cache.lease(paths[index % NUM_SHARDS]) as file:
            return file.read_at(512, 1)

    with ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(read, range(400)))
    assert contents == [bytes([index % NUM_SHARDS * PER_SHARD]) for index in range(400)]
    assert len(cache._open) == 1
    cache.close()
