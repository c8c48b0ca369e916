"""Labels: all fields get the right class numbers, and values that cannot name a class are refused."""

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

RECORDS = [
    {"animal": "cat", "hue_bin": 2, "is_wild": False, "place": {"country": "PE", "shelf": 10}},
    {"animal": "ant", "hue_bin": 0, "is_wild": True, "place": {"country": "AR", "shelf": 9}},
    {"animal": "cat", "hue_bin": 1, "is_wild": False, "place": {"country": "PE", "shelf": 9}},
    {"animal": "Ähre", "hue_bin": 2, "is_wild": True, "place": {"country": "CL", "shelf": -3}},
    {"animal": "dog", "hue_bin": 0, "is_wild": False, "place": {"country": "AR", "shelf": 10}},
]


def write_shards(folder, records: list, *, per_shard: int = 2, image_size: int = 700) -> ShardSet:
    """Write one sample per record: a dict, the bytes of the .json member, or None for no .json member."""
    folder.mkdir(exist_ok=True)
    for shard, first in enumerate(range(0, len(records), per_shard)):
        members = []
        for number, record in enumerate(records[first : first + per_shard], start=first):
            content = record if isinstance(record, bytes) else json.dumps(record).encode()
            members += [(f"{number}.cls", b"%d" % (number % 3)), (f"{number}.jpg", b"i" * image_size)]
            members += [] if record is None else [(f"{number}.json", content)]
        write_tar(folder / f"{shard}.tar", members)
    return open_shards(str(folder))


@pytest.fixture
def shards(tmp_path) -> ShardSet:
    return write_shards(tmp_path / "shards", RECORDS)


EXPECTED = {
    "cls": ([0, 1, 2, 0, 1], ("0", "1", "2")),
    "json.hue_bin": ([2, 0, 1, 2, 0], ("0", "1", "2")),
    "json.animal": ([1, 0, 1, 3, 2], ("ant", "cat", "dog", "Ähre")),
    "json.is_wild": ([0, 1, 0, 1, 0], ("false", "true")),
    "json.place.country": ([2, 0, 2, 1, 0], ("AR", "CL", "PE")),
    "json.place.shelf": ([2, 1, 1, 0, 2], ("-3", "9", "10")),
}


@pytest.mark.parametrize("field", EXPECTED)
def test_distinct_values_are_numbered_in_sorted_order(shards, field):
    labels = read_labels(shards, field)
    assert (labels.field, labels.number.tolist(), labels.classes) == (field, *EXPECTED[field])
    assert labels.counts.tolist() == np.bincount(labels.number).tolist()


def test_corrected_labels_have_another_digest(shards, tmp_path):
    def digest(records, field="json.animal", folder="other"):
        return read_labels(write_shards(tmp_path / folder, records), field).digest

    swapped = [RECORDS[0] | {"animal": RECORDS[1]["animal"]}, RECORDS[1] | {"animal": RECORDS[0]["animal"]}]
    renamed = [record | {"animal": record["animal"].replace("cat", "cow")} for record in RECORDS]
    original = read_labels(shards, "json.animal").digest
    assert digest(RECORDS, folder="copy") == original
    assert len({original, digest(swapped + RECORDS[2:]), digest(renamed), digest(RECORDS, "json.is_wild")}) == 4
    # The sizes of all members are the same, so that the digest of the shards is, too.
    assert open_shards(str(tmp_path / "other")).content_digest == shards.content_digest


def test_class_numbers_are_looked_up_by_the_samples_of_a_batch(shards):
    animal, shelf = read_labels(shards, "json.animal"), read_labels(shards, "json.place.shelf")
    for samples in ([3, 0, 4, 0], [2], []):
        batch = torch.tensor(samples, dtype=torch.int64)
        assert animal.of(batch).tolist() == [animal.number[sample] for sample in samples]
        assert [shelf.classes[number] for number in shelf.of(batch)] == [
            str(RECORDS[sample]["place"]["shelf"]) for sample in samples
        ]


def test_validation_uses_the_class_numbers_of_training(tmp_path):
    train = read_labels(write_shards(tmp_path / "train", RECORDS), "json.animal")
    val_shards = write_shards(tmp_path / "val", [RECORDS[4], RECORDS[0]])
    assert read_labels(val_shards, "json.animal").number.tolist() == [1, 0]
    val = read_labels(val_shards, "json.animal", classes=train.classes)
    assert val.classes == train.classes and [val.classes[number] for number in val.number] == ["dog", "cat"]
    assert val.counts.tolist() == [0, 1, 1, 0]
    shelf = read_labels(val_shards, "json.place.shelf", classes=("-3", "9", "10"))
    assert shelf.number.tolist() == [2, 2]


def test_a_class_that_training_lacks_is_refused_with_the_known_classes(tmp_path):
    shards = write_shards(tmp_path / "val", [RECORDS[0], RECORDS[1], {"animal": "elk"}, {"animal": "fox"}])
    with pytest.raises(ShardError, match=r"json\.animal is string \"elk\", which is .* classes ant, cat; ") as caught:
        read_labels(shards, "json.animal", classes=("ant", "cat"))
    assert (caught.value.shard, caught.value.key) == (f"{tmp_path}/val/1.tar", "2")
    many = [f"class{number}" for number in range(30)]
    with pytest.raises(ShardError, match=r"class19 and 10 more"):
        read_labels(shards, "json.animal", classes=many)
    with pytest.raises(ShardError, match=r"cls is integer 2, which is not one of the classes 0, 1; "):
        read_labels(shards, "cls", classes=("0", "1"))
    with pytest.raises(ValueError, match="name each class once"):
        read_labels(shards, "json.animal", classes=("cat", "cat"))


BROKEN = {
    "no json": (None, "json.animal", r"has no \.json member \(1 of 2 samples.*add the member"),
    "no such field": ({"colour": 1, "age": 2}, "json.animal", r"no field 'animal'; add it, or name .*: age, colour$"),
    "no fields": ([1, 2], "json.animal", "has no field 'animal'.*list, no fields"),
    "no inner field": ({"animal": "cat"}, "json.animal.name", "has no field 'animal.name'.*str, no fields"),
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
    "another type": ({"animal": 7}, "json.animal", 'is integer 7, but other samples have string "ant"'),
    "true is not 1": ({"hue_bin": True}, "json.hue_bin", "is boolean true, but other samples have integer 0"),
    "name of braces": ({"animal": "cat"}, "json.{0}", r"has no field '\{0\}'"),
}


@pytest.mark.parametrize("defect", BROKEN)
def test_a_value_that_names_no_class_is_refused_with_shard_and_key(tmp_path, defect):
    record, field, message = BROKEN[defect]
    first = {"name of braces": {"{0}": 1}, "no inner field": {"animal": {"name": "x"}}}.get(defect, RECORDS[1])
    shards = write_shards(tmp_path / "shards", [first, first, first, record])
    with pytest.raises(ShardError, match=message) as caught:
        read_labels(shards, field)
    assert (caught.value.shard, caught.value.key) == (f"{tmp_path}/shards/1.tar", "3")


def test_a_sample_without_a_class_number_is_refused(tmp_path):
    write_tar(tmp_path / "s.tar", [("a.cls", b"1"), ("a.jpg", b"x"), ("b.jpg", b"x")])
    with pytest.raises(ShardError, match=r"has no label.*an evaluation on cls needs.*\.cls") as caught:
        read_labels(open_shards(str(tmp_path)), "cls")
    assert caught.value.key == "b"


@pytest.mark.parametrize("field", ["", "json", "json.", "json..a", "json.a.", "label", "animal", ".json.a"])
def test_an_invalid_field_is_refused(shards, field):
    with pytest.raises(ValueError, match=r"field must be cls or json\.NAME, got"):
        read_labels(shards, field)


@pytest.mark.parametrize("address", ["{folder}", "file://{folder}"])
@pytest.mark.parametrize("image_size", [10, 90_000, 140_000])
def test_json_members_between_images_are_read_in_few_requests(tmp_path, monkeypatch, address, image_size):
    numbers = np.random.default_rng(0).permutation(300).tolist()
    folder = tmp_path / "shards"
    write_shards(
        folder, [{"n": number, "pad": "x" * (number % 7)} for number in numbers], per_shard=300, image_size=image_size
    )
    shards, sizes, read_at = open_shards(address.format(folder=folder)), [], ShardFile.read_at

    def recording_read_at(file: ShardFile, offset: int, size: int) -> bytes:
        sizes.append(size)
        return read_at(file, offset, size)

    monkeypatch.setattr(ShardFile, "read_at", recording_read_at)
    assert read_labels(shards, "json.n").number.tolist() == numbers
    # Few reads in total; for large local images, where requests are cheap, few bytes instead.
    is_separate = image_size > 128 * 1024 and "://" not in address
    assert max(sizes) <= 8 * 1024 * 1024 and (sum(sizes) < 10_000 if is_separate else len(sizes) <= 7)


def test_a_shard_truncated_after_indexing_is_noticed(shards, tmp_path):
    os.truncate(tmp_path / "shards" / "1.tar", 600)
    with pytest.raises(ShardError, match="has changed since it was indexed") as caught:
        read_labels(shards, "json.animal")
    assert caught.value.shard == f"{tmp_path}/shards/1.tar"
