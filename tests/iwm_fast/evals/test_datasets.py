"""Labelled sets: class numbers mean the same classes in training and validation shards, or are refused."""

import json
from pathlib import Path

import pytest
from PIL import Image

from iwm_fast.evals.datasets import LabelledSets, label_sets
from iwm_fast.pipelines.config import PackConfig
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.storage.shard_writer import pack_folder


def pack(folder: Path, names: list[str], classes: str = "") -> str:
    """Pack two images of each class and return the folder of the shards."""
    for name in names:
        (folder / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "images" / name / f"{number}.png")
    pack_folder(folder / "images", folder / "shards", PackConfig(classes=classes))
    return str(folder / "shards")


def labelled(train: str, val: str, label: str = "cls") -> LabelledSets:
    return label_sets(open_shards(train), open_shards(val), label)


def test_equal_numbers_with_other_class_names_are_refused(tmp_path):
    train = pack(tmp_path / "train", ["ant", "bee", "cat"])
    val = pack(tmp_path / "val", ["ant", "cat"])
    message = f"class 1 is 'bee' in {train}/classes.json, but 'cat' in {val}/classes.json; pack both sets together"
    with pytest.raises(ShardError) as refused:
        labelled(train, val)
    assert message in str(refused.value)
    assert "val_share=" in str(refused.value) and str(refused.value).endswith(f"with classes={train}/classes.json")
    # The remedy works, and labels that are names have the same meaning in both folders anyway.
    again = pack(tmp_path / "again", ["ant", "cat"], f"{train}/classes.json")
    assert set(labelled(train, again).val.number.tolist()) == {0, 2}
    assert set(labelled(train, val, "json.class").val.number.tolist()) == {0, 2}


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_class_names_of_all_folders_of_a_set_are_compared(tmp_path, address):
    first, second, third = (
        address.format(pack(tmp_path / str(number), names))
        for number, names in enumerate((["ant"], ["ant", "bee"], ["ant", "cat"]))
    )
    assert labelled(f"{first}::{second}", first).classes == ("0", "1")
    with pytest.raises(ShardError, match=r"class 1 is 'bee' in .*1/shards/classes\.json, but 'cat' in .*2/shards/"):
        labelled(f"{first}::{second}", third)


@pytest.mark.parametrize("content", [None, "{", json.dumps({"ant": 0}), "[1, 2]"])
def test_shards_without_a_list_of_class_names_are_not_compared(tmp_path, content, caplog):
    train, val = pack(tmp_path / "train", ["ant", "bee"]), pack(tmp_path / "val", ["cat", "dog"])
    path = Path(val, "classes.json")
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert labelled(train, val).classes == ("0", "1")
    assert (f"the class names in {path} are not compared" in caplog.text) == (content is not None)
