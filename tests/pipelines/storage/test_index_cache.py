"""A stored index saves reading the headers and is never used when it is outdated or damaged."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from fixtures.tar_files import write_tar
from iwm_fast.pipelines.storage.index_cache import MIN_AGE_NS, file_version, load_or_index, save_filtered_index
from iwm_fast.pipelines.storage.shard import Shard, index_shard
from iwm_fast.pipelines.storage.shard_set import open_shards

LONG_AGO_NS = 1_700_000_000 * 10**9
MEMBERS = [
    ("a/one two.jpg", b"first"), ("a/one two.cls", b"3"), ("a/one two.json", b"{}"),
    ("é.png", b"second"), ("plain.jpg", b"third"), ("plain.cls", b"0"), ("plain.seg.png", b"map"),
]  # fmt: skip


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("IWM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


@pytest.fixture
def path(tmp_path, cache):
    return shard_at(tmp_path / "s.tar", MEMBERS)


def shard_at(path: Path, members, changed_ns: int = LONG_AGO_NS) -> str:
    write_tar(path, members)
    os.utime(path, ns=(changed_ns, changed_ns))
    return str(path)


def assert_same(first: Shard, second: Shard) -> None:
    assert (first.path, first.size_bytes, first.keys) == (second.path, second.size_bytes, second.keys)
    for name in (field.name for field in fields(Shard) if isinstance(getattr(first, field.name), np.ndarray)):
        first_array, second_array = getattr(first, name), getattr(second, name)
        assert np.array_equal(first_array, second_array) and first_array.dtype == second_array.dtype, name


def overwrite_headers(path: str) -> None:
    """Make all headers unreadable without changing size or time, so that samples can only come from an index."""
    Path(path).write_bytes(b"\xff" * os.path.getsize(path))
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))


def test_a_stored_index_equals_the_one_read_and_replaces_reading(path):
    fresh = index_shard(path)
    assert_same(load_or_index(path), fresh)
    assert Path(f"{path}.index").is_file()
    overwrite_headers(path)
    assert_same(load_or_index(path), fresh)


def test_a_shard_that_changed_is_read_again(path):
    load_or_index(path)
    # Another size at the same time.
    shard_at(Path(path), [("large.jpg", b"x" * 20_000)], LONG_AGO_NS)
    assert load_or_index(path).keys == ("large",)
    # The same size at another time: the sizes of tar files are multiples of 10 KiB.
    size = os.path.getsize(path)
    shard_at(Path(path), [("other.jpg", b"y" * 20_000)], LONG_AGO_NS + 1)
    assert os.path.getsize(path) == size and load_or_index(path).keys == ("other",)


def test_the_index_of_a_shard_written_just_now_is_not_stored(tmp_path, cache):
    path = shard_at(tmp_path / "new.tar", MEMBERS, time.time_ns())
    load_or_index(path)
    assert not Path(f"{path}.index").exists() and not cache.exists()
    os.utime(path, ns=(time.time_ns() - 2 * MIN_AGE_NS,) * 2)
    load_or_index(path)
    assert Path(f"{path}.index").exists()


@pytest.mark.parametrize("positions", [[], [1]])
def test_the_check_of_a_shard_with_a_time_in_the_future_says_so_and_does_not_wait(
    tmp_path, cache, monkeypatch, caplog, positions
):
    path = shard_at(tmp_path / "s.tar", MEMBERS, time.time_ns() + 3600 * 10**9)
    waited_s = []
    monkeypatch.setattr(time, "sleep", waited_s.append)
    expected = pytest.raises(OSError, match="1 samples cannot be decoded") if positions else nullcontext()
    with expected as caught:
        save_filtered_index(index_shard(path), file_version(path), positions)
    message = f"{caught.value}" if positions else caplog.text
    assert f"the modification time of {path} lies 3," in message and "run `touch` on it" in message
    assert waited_s == [] and not Path(f"{path}.index").exists() and not cache.exists()


def test_the_check_of_a_shard_written_just_now_waits_until_it_can_store_the_index(tmp_path, cache, monkeypatch):
    now_ns, waited_s = time.time_ns(), []
    path = shard_at(tmp_path / "s.tar", MEMBERS, now_ns)
    monkeypatch.setattr(time, "sleep", waited_s.append)
    monkeypatch.setattr(time, "time_ns", lambda: now_ns)
    save_filtered_index(index_shard(path), file_version(path), [1])
    assert waited_s == [MIN_AGE_NS / 1e9] and load_or_index(path).num_left_out == 1


def test_an_index_is_rebuilt_wherever_it_is_damaged(path, caplog):
    fresh = load_or_index(path)
    index = Path(f"{path}.index")
    complete = index.read_bytes()
    cut = [complete[:size] for size in range(0, len(complete), 37)]
    flipped = [complete[:at] + bytes([complete[at] ^ 1]) + complete[at + 1 :] for at in range(0, len(complete), 23)]
    for content in (*cut, *flipped, b"{}", b"\0" * 100, complete + b"x"):
        index.write_bytes(content)
        assert_same(load_or_index(path), fresh)
    assert "it is rebuilt" in caplog.text
    assert index.read_bytes() == complete


def test_without_a_writable_folder_the_index_is_stored_in_the_cache(path, cache):
    # A folder at the index's path: even root cannot write a file there.
    Path(f"{path}.index").mkdir()
    fresh = load_or_index(path)
    assert len(list(cache.iterdir())) == 1
    overwrite_headers(path)
    assert_same(load_or_index(path), fresh)


def test_bad_samples_stay_out_although_an_older_index_remains(path, cache):
    load_or_index(path)
    beside = Path(f"{path}.index")
    old = beside.read_bytes()
    beside.unlink()
    beside.mkdir()
    save_filtered_index(index_shard(path), file_version(path), [1])
    beside.rmdir()
    beside.write_bytes(old)
    assert load_or_index(path).keys == ("a/one two", "plain") and load_or_index(path).num_left_out == 1


def test_without_any_writable_folder_the_run_continues_with_a_warning(path, cache, caplog):
    Path(f"{path}.index").mkdir()
    cache.parent.write_text("no folder")
    assert_same(load_or_index(path), index_shard(path))
    assert "cannot be stored and will be rebuilt" in caplog.text


def test_indexes_of_remote_shards_are_stored_in_the_cache(path, cache):
    address = f"file://{path}"
    fresh = load_or_index(address)
    assert fresh.keys == index_shard(path).keys
    assert not Path(f"{path}.index").exists() and len(list(cache.iterdir())) == 1
    overwrite_headers(path)
    assert_same(load_or_index(address), fresh)


def test_concurrent_indexing_agrees_and_leaves_no_temporary_files(path):
    with ThreadPoolExecutor(8) as pool:
        shards = list(pool.map(load_or_index, [path] * 32))
    for shard in shards:
        assert_same(shard, shards[0])
    assert sorted(entry.name for entry in Path(path).parent.iterdir()) == ["s.tar", "s.tar.index"]


def test_a_process_killed_while_writing_leaves_no_partial_index(path):
    # Killed at the latest moment, between writing the last byte and renaming the index.
    script = (
        "import os, signal, sys, pathlib; from iwm_fast.pipelines.storage.index_cache import load_or_index; "
        "pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); load_or_index(sys.argv[1])"
    )
    process = subprocess.run([sys.executable, "-c", script, path], check=False, capture_output=True)
    assert process.returncode == -9
    assert not Path(f"{path}.index").exists()
    assert_same(load_or_index(path), index_shard(path))
    assert Path(f"{path}.index").is_file()


def test_a_set_of_shards_uses_stored_indexes(path):
    first = open_shards(path)
    overwrite_headers(path)
    again = open_shards(path)
    assert again.content_digest == first.content_digest
