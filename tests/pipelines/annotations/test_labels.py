"""Labels: every field of every sample gets the right class number, and what names no class is refused by name."""

import json
import os

import numpy as np
import pytest
import torch

from fixtures.tar_files import write_tar
from iwm_fast.pipelines.annotations.labels import read_labels
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.storage.tar_reader import ShardFile

NOTES = [
    {"animal": "cat", "hue_bin": 2, "is_wild": False, "place": {"country": "PE", "shelf": 10}},
    {"animal": "ant", "hue_bin": 0, "is_wild": True, "place": {"country": "AR", "shelf": 9}},
    {"animal": "cat", "hue_bin": 1, "is_wild": False, "place": {"country": "PE", "shelf": 9}},
    {"animal": "Ähre", "hue_bin": 2, "is_wild": True, "place": {"country": "CL", "shelf": -3}},
    {"animal": "dog", "hue_bin": 0, "is_wild": False, "place": {"country": "AR", "shelf": 10}},
]


def write_shards(folder, notes: list, *, per_shard: int = 2, image_size: int = 700) -> ShardSet:
    """Write one sample per note: a dict, bytes as they are, or None for no .json."""
    folder.mkdir(exist_ok=True)
    for shard, first in enumerate(range(0, len(notes), per_shard)):
        members = []
        for number, note in enumerate(notes[first : first + per_shard], start=first):
            content = note if isinstance(note, bytes) else json.dumps(note).encode()
            members += [(f"{number}.cls", b"%d" % (number % 3)), (f"{number}.jpg", b"i" * image_size)]
            members += [] if note is None else [(f"{number}.json", content)]
        write_tar(folder / f"{shard}.tar", members)
    return open_shards(str(folder))


@pytest.fixture
def shards(tmp_path) -> ShardSet:
    return write_shards(tmp_path / "shards", NOTES)


CASES = {
    "cls": ([0, 1, 2, 0, 1], ("0", "1", "2")),
    "json.hue_bin": ([2, 0, 1, 2, 0], ("0", "1", "2")),
    "json.animal": ([1, 0, 1, 3, 2], ("ant", "cat", "dog", "Ähre")),
    "json.is_wild": ([0, 1, 0, 1, 0], ("false", "true")),
    "json.place.country": ([2, 0, 2, 1, 0], ("AR", "CL", "PE")),
    "json.place.shelf": ([2, 1, 1, 0, 2], ("-3", "9", "10")),
}


@pytest.mark.parametrize("field", CASES)
def test_distinct_values_are_numbered_in_sorted_order(shards, field):
    labels = read_labels(shards, field)
    assert (labels.field, labels.number.tolist(), labels.classes) == (field, *CASES[field])
    assert labels.counts.tolist() == np.bincount(labels.number).tolist()


def test_class_numbers_follow_the_samples_of_a_batch(shards):
    animal, shelf = read_labels(shards, "json.animal"), read_labels(shards, "json.place.shelf")
    for samples in ([3, 0, 4, 0], [2], []):
        batch = torch.tensor(samples, dtype=torch.int64)
        assert animal.of(batch).tolist() == [animal.number[sample] for sample in samples]
        assert [shelf.classes[number] for number in shelf.of(batch)] == [
            str(NOTES[sample]["place"]["shelf"]) for sample in samples
        ]


def test_validation_takes_the_numbers_of_training_also_for_classes_it_lacks(tmp_path):
    train = read_labels(write_shards(tmp_path / "train", NOTES), "json.animal")
    val_shards = write_shards(tmp_path / "val", [NOTES[4], NOTES[0]])
    assert read_labels(val_shards, "json.animal").number.tolist() == [1, 0]
    val = read_labels(val_shards, "json.animal", classes=train.classes)
    assert val.classes == train.classes and [val.classes[number] for number in val.number] == ["dog", "cat"]
    assert val.counts.tolist() == [0, 1, 1, 0]
    shelf = read_labels(val_shards, "json.place.shelf", classes=("-3", "9", "10"))
    assert shelf.number.tolist() == [2, 2]


def test_a_class_that_training_does_not_know_is_refused_with_those_it_knows(tmp_path):
    shards = write_shards(tmp_path / "val", [NOTES[0], NOTES[1], {"animal": "elk"}, {"animal": "fox"}])
    with pytest.raises(ShardError, match=r"json\.animal is string \"elk\".*known are ant, cat") as caught:
        read_labels(shards, "json.animal", classes=("ant", "cat"))
    assert (caught.value.shard, caught.value.key) == (f"{tmp_path}/val/1.tar", "2")
    many = [f"class{number}" for number in range(30)]
    with pytest.raises(ShardError, match=r"class19 and 10 more"):
        read_labels(shards, "json.animal", classes=many)
    with pytest.raises(ShardError, match=r"cls is integer 2, no class that is known; known are 0, 1"):
        read_labels(shards, "cls", classes=("0", "1"))
    with pytest.raises(ValueError, match="name each class once"):
        read_labels(shards, "json.animal", classes=("cat", "cat"))


BROKEN = {
    "no json": (None, "json.animal", r"has no \.json, like 1 of 2 samples.*add the member"),
    "no such field": ({"colour": 1, "age": 2}, "json.animal", r"has no 'animal'; add it, or name .*: age, colour$"),
    "no fields": ([1, 2], "json.animal", "has no 'animal'.*list, no fields"),
    "no inner field": ({"animal": "cat"}, "json.animal.name", "has no 'animal.name'.*str, no fields"),
    "number with a fraction": (
        {"animal": 0.5},
        "json.animal",
        r"json\.animal is 0\.5; a class is a string, an integer",
    ),
    "not a number": (b'{"animal": NaN}', "json.animal", "is NaN; a class is"),
    "nothing": ({"animal": None}, "json.animal", "is null; a class is"),
    "list": ({"animal": ["cat"]}, "json.animal", r'is \["cat"\]; a class is'),
    "cut": (b'{"animal": "ca', "json.animal", "does not parse: Unterminated string.*write the member again"),
    "empty": (b"", "json.animal", "does not parse"),
    "no text": (b"\xff\xfe\xfd", "json.animal", "does not parse"),
    "deep": (b"[" * 100_000, "json.animal", "does not parse"),
    "another kind": ({"animal": 7}, "json.animal", 'is integer 7, where others have string "ant"'),
    "true is no 1": ({"hue_bin": True}, "json.hue_bin", "is boolean true, where others have integer 0"),
    "name of braces": ({"animal": "cat"}, "json.{0}", r"has no '\{0\}'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_names_no_class_is_refused_by_shard_and_key_with_a_remedy(tmp_path, case):
    note, field, message = BROKEN[case]
    first = {"name of braces": {"{0}": 1}, "no inner field": {"animal": {"name": "x"}}}.get(case, NOTES[1])
    shards = write_shards(tmp_path / "shards", [first, first, first, note])
    with pytest.raises(ShardError, match=message) as caught:
        read_labels(shards, field)
    assert (caught.value.shard, caught.value.key) == (f"{tmp_path}/shards/1.tar", "3")


def test_a_sample_without_class_number_is_refused(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.cls", b"1"), ("a.jpg", b"x"), ("b.jpg", b"x")])
    with pytest.raises(ShardError, match=r"has no label.*a task on cls needs one.*\.cls") as caught:
        read_labels(open_shards(str(tmp_path)), "cls")
    assert caught.value.key == "b"


@pytest.mark.parametrize("field", ["", "json", "json.", "json..a", "json.a.", "label", "animal", ".json.a"])
def test_a_field_that_is_no_name_is_refused(shards, field):
    with pytest.raises(ValueError, match=r"field must be cls or json\.NAME, got"):
        read_labels(shards, field)


@pytest.mark.parametrize("address", ["{folder}", "file://{folder}"])
@pytest.mark.parametrize("image_size", [10, 90_000, 140_000])
def test_members_between_images_of_any_size_are_read_right_with_few_reads(tmp_path, monkeypatch, address, image_size):
    numbers = np.random.default_rng(0).permutation(300).tolist()
    folder = tmp_path / "shards"
    write_shards(
        folder, [{"n": number, "pad": "x" * (number % 7)} for number in numbers], per_shard=300, image_size=image_size
    )
    shards, sizes, read_at = open_shards(address.format(folder=folder)), [], ShardFile.read_at

    def counted(file: ShardFile, offset: int, size: int) -> bytes:
        sizes.append(size)
        return read_at(file, offset, size)

    monkeypatch.setattr(ShardFile, "read_at", counted)
    assert read_labels(shards, "json.n").number.tolist() == numbers
    # either few reads, or, where images are large and a request is cheap, little is read
    is_apart = image_size > 128 * 1024 and "://" not in address
    assert max(sizes) <= 8 * 1024 * 1024 and (sum(sizes) < 10_000 if is_apart else len(sizes) <= 7)


def test_a_shard_that_has_shrunk_since_it_was_indexed_is_noticed(shards, tmp_path):
    os.truncate(tmp_path / "shards" / "1.tar", 600)
    with pytest.raises(ShardError, match="has changed since it was indexed") as caught:
        read_labels(shards, "json.animal")
    assert caught.value.shard == f"{tmp_path}/shards/1.tar"
