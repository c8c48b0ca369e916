"""The index of a data set equals the indexes of its shards; an outdated, damaged or foreign one is made again."""

import hashlib
import os
import pickle
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fixtures.tar_files import write_tar
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage import dataset_cache
from iwm_fast.pipelines.storage.index_cache import file_version, load_or_index, save_filtered_index
from iwm_fast.pipelines.storage.shard import INTEGER_FIELDS, Shard, StoredStrings, index_shard
from iwm_fast.pipelines.storage.shard_set import ShardSet, find_shards, open_shards

LONG_AGO_NS = 1_700_000_000 * 10**9
IN_AN_HOUR_NS = time.time_ns() + 3600 * 10**9


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("IWM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "index"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Shards of 1, 2 and 3 samples, with labels, masks, json members and names that are not UTF-8."""
    for number in range(3):
        members = {"é\udcff.jpg": b"x" * (number + 1), "é\udcff.cls": b"%d" % number}
        members |= {"b/c d.png": b"yy", "b/c d.json": b"{}"} if number > 0 else {}
        members |= {"e.jpg": b"", "e.seg.png": b"map", "e.cls": b"7"} if number > 1 else {}
        shard_at(tmp_path / "shards" / f"{number}.tar", members)
    return tmp_path / "shards"


def shard_at(path: Path, members: dict[str, bytes], changed_ns: int = LONG_AGO_NS) -> None:
    path.parent.mkdir(exist_ok=True)
    write_tar(path, list(members.items()))
    os.utime(path, ns=(changed_ns, changed_ns))


def open_twice(spec: object) -> ShardSet:
    """Open shards whose indexes are stored while they are opened for the first time, and the set's index thereafter."""
    open_shards(str(spec))
    return open_shards(str(spec))


def stored_index(folder: Path) -> Path:
    (path,) = folder.glob("index-*.arrow")
    return path


def plain_digest(shards: list[Shard]) -> str:
    """The digest of runs that were started before data sets had an index of their own."""
    digest = hashlib.sha256()
    for shard in shards:
        keys = [key.encode("utf-8", "surrogateescape") for key in shard.keys]
        for numbers in ([len(keys)], [len(key) for key in keys], shard.image_size, shard.label):
            digest.update(np.asarray(numbers, "<i8").tobytes())
        digest.update(b"".join(keys))
    return digest.hexdigest()


def assert_equals_plain(shards: ShardSet, plain: list[Shard]) -> None:
    """Compare a set with the indexes of its shards, field by field and sample by sample."""
    assert len(shards.shards) == len(plain) and shards.content_digest == plain_digest(plain)
    for actual, expected in zip(shards.shards, plain, strict=True):
        for name in (field.name for field in fields(Shard) if field.name not in ("unused", *INTEGER_FIELDS)):
            assert getattr(actual, name) == getattr(expected, name), name
        for name in INTEGER_FIELDS:
            assert np.array_equal(getattr(actual, name), getattr(expected, name)), name
            assert getattr(actual, name).dtype == np.int64
    samples = range(shards.num_samples)
    assert [shards.key(sample) for sample in samples] == [key for shard in plain for key in shard.keys]
    labels = np.concatenate([shard.label for shard in plain])
    assert shards.labels(np.array(samples)).tolist() == shards.all_labels.tolist() == labels.tolist()
    assert shards.num_unlabelled == (labels < 0).sum()
    assert shards.is_checked.tolist() == [shard.is_checked for shard in plain]
    assert list(shards.paths) == [shard.path for shard in plain]


def plain_shards(spec: str) -> list[Shard]:
    return [index_shard(path) for path in find_shards(spec)]


@pytest.mark.parametrize("place", ["next to the shards", "remote", "read-only folder", "new shards"])
def test_a_set_equals_its_shards(folder, cache, place):
    spec = f"file://{folder}" if place == "remote" else str(folder)
    plain = plain_shards(spec)
    if place == "new shards":
        open_twice(spec)
        stored_index(folder).unlink()
        # A shard that has just changed may change again without another time, so that no index is stored.
        os.utime(folder / "2.tar", ns=(IN_AN_HOUR_NS, IN_AN_HOUR_NS))
    if place == "read-only folder":
        open_twice(spec)
        path = stored_index(folder)
        path.unlink()
        # A folder at the path of the index: even root cannot write a file there.
        path.mkdir()
    for _ in range(3):
        assert_equals_plain(open_shards(spec), plain)
    names = [path.name for path in folder.glob("index-*.arrow") if path.is_file()]
    assert (len(names), len(list(cache.glob("*.arrow")))) == {
        "next to the shards": (1, 0), "remote": (0, 1), "read-only folder": (0, 1), "new shards": (0, 0),
    }[place]  # fmt: skip


def test_a_stored_index_replaces_those_of_the_shards_and_is_a_plain_arrow_file(folder):
    plain = plain_shards(str(folder))
    digest = open_twice(folder).content_digest
    for path in folder.glob("*.tar.index"):
        # Of the same size and age, and in the same place on the disk.
        status = path.stat()
        path.write_bytes(b"\0" * status.st_size)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = open_shards(str(folder))
    assert again.content_digest == digest
    assert_equals_plain(again, plain)
    table = pa.ipc.open_file(str(stored_index(folder))).read_all()
    assert [row["label"] for shard in table["samples"].to_pylist() for row in shard] == again.all_labels.tolist()


def leave_out_a_sample(folder: Path) -> None:
    path = str(folder / "2.tar")
    save_filtered_index(index_shard(path), file_version(path), [1])


CHANGES = {
    "a shard of another size": lambda folder: shard_at(folder / "1.tar", {"new.jpg": b"x" * 30_000}),
    "a shard of another age": lambda folder: shard_at(folder / "1.tar", {"new.jpg": b"x"}, LONG_AGO_NS + 1),
    "a further shard": lambda folder: shard_at(folder / "3.tar", {"new.jpg": b"x"}),
    "a shard less": lambda folder: (folder / "1.tar").unlink(),
    "a sample left out by iwm shards check": leave_out_a_sample,
}


@pytest.mark.parametrize("change", CHANGES)
def test_an_outdated_index_is_made_again(folder, change):
    digest = open_twice(folder).content_digest
    CHANGES[change](folder)
    shards = open_shards(str(folder))
    assert shards.content_digest != digest
    assert_equals_plain(shards, [load_or_index(path) for path in find_shards(str(folder))])
    for _ in range(2):
        assert_equals_plain(open_shards(str(folder)), list(shards.shards))


def test_an_outdated_index_stays_as_it_is_and_is_removed_when_it_is_old(folder):
    first = open_twice(folder)
    old = stored_index(folder)
    before = old.stat()
    leave_out_a_sample(folder)
    assert open_shards(str(folder)).num_samples == first.num_samples - 1
    # Another machine that has mapped it over NFS would lose a file that is replaced.
    after = old.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    os.utime(old, ns=(LONG_AGO_NS, LONG_AGO_NS))
    shard_at(folder / "1.tar", {"new.jpg": b"x"}, LONG_AGO_NS + 1)
    open_twice(folder)
    kept = list(folder.glob("index-*.arrow"))
    assert len(kept) == 2 and old not in kept


def test_shards_with_times_in_the_future_are_named_with_the_remedy(folder, caplog):
    os.utime(folder / "1.tar", ns=(IN_AN_HOUR_NS, IN_AN_HOUR_NS))
    open_shards(str(folder))
    text = f"the modification times of 1 shards lie in the future, the first is {folder}/1.tar; "
    assert text in caplog.text and "run `touch` on them" in caplog.text
    caplog.clear()
    os.utime(folder / "1.tar", ns=(LONG_AGO_NS, LONG_AGO_NS))
    open_shards(str(folder))
    assert "future" not in caplog.text


def test_a_damaged_or_foreign_index_is_made_again(folder, tmp_path, caplog):
    plain = plain_shards(str(folder))
    open_twice(folder)
    path = stored_index(folder)
    complete = path.read_bytes()
    foreign = tmp_path / "foreign"
    shard_at(foreign / "0.tar", {"other.jpg": b"x"})
    open_twice(foreign)
    flipped = [complete[:at] + bytes([complete[at] ^ 255]) + complete[at + 1 :] for at in range(0, len(complete), 71)]
    cut = [complete[:size] for size in range(0, len(complete), 301)]
    for content in (*flipped, *cut, stored_index(foreign).read_bytes(), b"{}", complete + b"x"):
        path.write_bytes(content)
        assert_equals_plain(open_shards(str(folder)), plain)
    assert path.read_bytes() == complete and "it is rebuilt" in caplog.text


def test_each_choice_of_images_has_its_own_index(tmp_path):
    shard_at(tmp_path / "s" / "0.tar", {"a.left.jpg": b"x", "a.right.jpg": b"yy"})
    images = ("left.jpg", "right.jpg", "left.jpg", "right.jpg")
    sizes = [open_shards(str(tmp_path / "s"), image).shards[0].image_size.tolist() for image in images]
    assert sizes == [[1], [2], [1], [2]] and len(list((tmp_path / "s").glob("index-*.arrow"))) == 2


def test_the_remarks_about_shards_are_made_whenever_they_are_opened(folder, caplog):
    shard_at(folder / "3.tar", {"a.txt": b"x"})
    for _ in range(3):
        caplog.clear()
        open_shards(str(folder))
        assert "1 of 4 shards are left out because they hold no image" in caplog.text


@pytest.mark.parametrize("is_new", [False, True], ids=["on disk", "in memory"])
def test_a_pickled_set_takes_a_few_hundred_bytes_whatever_it_holds(folder, is_new):
    members = {f"{number:06}.jpg": b"" for number in range(500)}
    shard_at(folder / "1.tar", members, IN_AN_HOUR_NS if is_new else LONG_AGO_NS)
    shards = open_twice(folder).truncated(400)
    content = pickle.dumps(shards)
    assert len(content) < 600
    assert_equals_plain(pickle.loads(content), list(shards.shards))
    assert len(list(folder.glob("index-*.arrow"))) == (not is_new)


def test_a_pickled_set_is_opened_by_name_where_its_index_is_not(folder):
    shards = open_twice(folder).truncated(5)
    content, plain = pickle.dumps(shards), list(shards.shards)
    stored_index(folder).unlink()
    assert_equals_plain(pickle.loads(content), plain)
    stored_index(folder).unlink()
    shard_at(folder / "1.tar", {"new.jpg": b"x"}, LONG_AGO_NS + 1)
    with pytest.raises(ShardError, match="has other samples on this machine"):
        pickle.loads(content)


def test_many_shards_without_an_index_are_indexed_in_processes(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(dataset_cache, "_SHARDS_PER_PROCESS", 2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    for number in range(5):
        shard_at(tmp_path / "s" / f"{number}.tar", {f"{number}.jpg": b"x", f"{number}.cls": b"1"})
    shard_at(tmp_path / "s" / "5.tar", {"5.txt": b"x"})
    caplog.set_level("INFO")
    indexed = []
    monkeypatch.setattr(
        dataset_cache, "load_or_index", lambda path, image: indexed.append(path) or load_or_index(path, image)
    )
    in_processes = dataset_cache._index_in_processes

    def index(paths, image):
        is_done = in_processes(paths, image)
        assert len(list((tmp_path / "s").glob("*.tar.index"))) == 5 and indexed == []
        return is_done

    monkeypatch.setattr(dataset_cache, "_index_in_processes", index)
    shards = open_shards(str(tmp_path / "s"))
    assert "indexing 6 shards in 2 processes" in caplog.text
    assert_equals_plain(shards, [index_shard(path) for path in find_shards(f"{tmp_path}/s/{{0..4}}.tar")])


def test_stored_strings_are_a_sequence():
    texts = ("a", "", "é", "\udcff", "last")
    stored = StoredStrings.of(texts)
    assert tuple(stored) == texts and stored == texts and stored != texts[:4] and len(stored) == 5
    assert stored[-1] == "last" and stored[1:3] == ("", "é") and stored[4:2] == () and stored[2:][1] == "\udcff"
    assert stored[1:3].content.tobytes() == "é".encode()
    with pytest.raises(IndexError):
        stored[5]
