"""An index on disk saves reading headers and is never believed when it should not be."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
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
        one, other = getattr(first, name), getattr(second, name)
        assert np.array_equal(one, other) and one.dtype == other.dtype, name


def spoil(path: str) -> None:
    """Make every header unreadable without changing size or time: who still knows the samples has an index."""
    Path(path).write_bytes(b"\xff" * os.path.getsize(path))
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))


def test_a_kept_index_is_the_one_that_was_read_and_saves_reading(path):
    fresh = index_shard(path)
    assert_same(load_or_index(path), fresh)
    assert Path(f"{path}.index").is_file()
    spoil(path)
    assert_same(load_or_index(path), fresh)


def test_a_shard_that_changed_is_read_again(path):
    load_or_index(path)
    # another size at the same time
    shard_at(Path(path), [("large.jpg", b"x" * 20_000)], LONG_AGO_NS)
    assert load_or_index(path).keys == ("large",)
    # the same size at another time: tars come in steps of 10 KiB
    size = os.path.getsize(path)
    shard_at(Path(path), [("other.jpg", b"y" * 20_000)], LONG_AGO_NS + 1)
    assert os.path.getsize(path) == size and load_or_index(path).keys == ("other",)


def test_a_shard_that_has_just_been_written_is_read_every_time(tmp_path, cache):
    path = shard_at(tmp_path / "new.tar", MEMBERS, time.time_ns())
    load_or_index(path)
    assert not Path(f"{path}.index").exists() and not cache.exists()
    os.utime(path, ns=(time.time_ns() - 2 * MIN_AGE_NS,) * 2)
    load_or_index(path)
    assert Path(f"{path}.index").exists()


def test_a_damaged_index_is_made_anew_wherever_it_is_damaged(path, caplog):
    fresh = load_or_index(path)
    index = Path(f"{path}.index")
    whole = index.read_bytes()
    cut = [whole[:size] for size in range(0, len(whole), 37)]
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 23)]
    for content in (*cut, *flipped, b"{}", b"\0" * 100, whole + b"x"):
        index.write_bytes(content)
        assert_same(load_or_index(path), fresh)
    assert "made anew" in caplog.text
    assert index.read_bytes() == whole


def test_where_the_folder_cannot_be_written_the_cache_keeps_the_index(path, cache):
    # a folder in the index's place: root may write everywhere, but not there
    Path(f"{path}.index").mkdir()
    fresh = load_or_index(path)
    assert len(list(cache.iterdir())) == 1
    spoil(path)
    assert_same(load_or_index(path), fresh)


def test_what_was_left_out_stays_out_though_an_older_index_cannot_be_replaced(path, cache):
    load_or_index(path)
    beside = Path(f"{path}.index")
    old = beside.read_bytes()
    beside.unlink()
    beside.mkdir()
    save_filtered_index(index_shard(path), file_version(path), [1])
    beside.rmdir()
    beside.write_bytes(old)
    assert load_or_index(path).keys == ("a/one two", "plain") and load_or_index(path).num_left_out == 1


def test_where_nothing_can_be_written_the_run_goes_on_and_says_so(path, cache, caplog):
    Path(f"{path}.index").mkdir()
    cache.parent.write_text("no folder")
    assert_same(load_or_index(path), index_shard(path))
    assert "cannot be kept and will be made again" in caplog.text


def test_remote_shards_are_indexed_in_the_cache(path, cache):
    address = f"file://{path}"
    fresh = load_or_index(address)
    assert fresh.keys == index_shard(path).keys
    assert not Path(f"{path}.index").exists() and len(list(cache.iterdir())) == 1
    spoil(path)
    assert_same(load_or_index(address), fresh)


def test_many_at_once_agree_and_leave_nothing_else_behind(path):
    with ThreadPoolExecutor(8) as pool:
        shards = list(pool.map(load_or_index, [path] * 32))
    for shard in shards:
        assert_same(shard, shards[0])
    assert sorted(entry.name for entry in Path(path).parent.iterdir()) == ["s.tar", "s.tar.index"]


def test_a_process_killed_while_writing_leaves_no_index_that_is_taken_for_whole(path):
    # the kill falls between the last byte and the moment the index gets its name, the latest there is
    script = (
        "import os, signal, sys, pathlib; from iwm_fast.pipelines.storage.index_cache import load_or_index; "
        "pathlib.Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); load_or_index(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", script, path], check=False, capture_output=True)
    assert done.returncode == -9
    assert not Path(f"{path}.index").exists()
    assert_same(load_or_index(path), index_shard(path))
    assert Path(f"{path}.index").is_file()


def test_a_set_of_shards_uses_kept_indexes(path):
    first = open_shards(path)
    spoil(path)
    again = open_shards(path)
    assert again.content_digest == first.content_digest
