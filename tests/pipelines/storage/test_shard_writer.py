"""Packing shards: image bytes do not change, the result is reproducible, and nothing is overwritten."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixtures.tar_files import digests, samples_of
from iwm_fast.pipelines.config import PackConfig
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.storage.shard_writer import pack_folder


def image_file(path: Path, grey: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(path)
    return path


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "images"
    for number in range(11):
        image_file(folder / "cat" / f"a b.{number}.JPG", number)
        image_file(folder / "ant" / "deep" / f"ü{number}.png", 100 + number)
    (folder / "ant" / "notes.txt").write_text("no image")
    (folder / "ant" / ".hidden.jpg").write_text("no image")
    (folder / "LICENSE").write_text("beside the classes")
    return folder


def test_packed_images_keep_their_bytes_class_and_name(source, tmp_path):
    paths = pack_folder(source, tmp_path / "out", PackConfig(samples_per_shard=10))
    assert [path.name for path in paths] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["ant", "cat"]
    packed = samples_of(f"{tmp_path}/out/shard-{{000000..000002}}.tar")
    for sample in packed:
        metadata = json.loads(sample["json"])
        extension = metadata["file"].split(".")[-1].lower()
        assert sample[extension] == (source / metadata["file"]).read_bytes()
        assert ["ant", "cat"][int(sample["cls"])] == metadata["class"] == metadata["file"].split("/")[0]
    assert len({json.loads(sample["json"])["file"] for sample in packed}) == 22


def test_packed_shards_can_be_indexed_and_have_unique_keys_without_dots(source, tmp_path):
    pack_folder(source, tmp_path / "out", PackConfig(samples_per_shard=10))
    shards = open_shards(str(tmp_path / "out"))
    keys = [key for shard in shards.shards for key in shard.keys]
    assert len(set(keys)) == shards.num_samples == 22
    assert not any("." in key or " " in key or not key.isascii() for key in keys)
    assert np.bincount(shards.labels(np.arange(22))).tolist() == [11, 11]


def test_packed_classes_are_mixed(source, tmp_path):
    pack_folder(source, tmp_path / "out", PackConfig(samples_per_shard=11))
    shards = open_shards(str(tmp_path / "out"))
    assert set(shards.shards[0].label.tolist()) == {0, 1}


def test_packing_twice_gives_the_same_bytes(source, tmp_path):
    pack_folder(source, tmp_path / "one")
    pack_folder(source, tmp_path / "two")
    pack_folder(source, tmp_path / "other", seed=1)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") != digests(tmp_path / "other")


def test_packing_works_under_any_folder_name(source, tmp_path):
    paths = pack_folder(source, tmp_path / "100% of {a,b}: x", PackConfig(samples_per_shard=30))
    assert len(paths) == 1 and open_shards(str(paths[0])).num_samples == 22


def test_nothing_is_overwritten(source, tmp_path):
    destination = tmp_path / "out"
    pack_folder(source, destination)
    before = digests(destination)
    with pytest.raises(FileExistsError, match=r"holds 1 shards.*nothing is overwritten"):
        pack_folder(source, destination)
    assert digests(destination) == before


def test_a_failure_leaves_no_files(source, tmp_path):
    (source / "cat" / "empty.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.jpg is empty; replace or remove it"):
        pack_folder(source, tmp_path / "out" / "deep")
    assert list((tmp_path / "out").iterdir()) == []


def test_sources_that_are_not_image_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pack_folder(tmp_path / "none", tmp_path / "out")
    source = tmp_path / "images"
    source.mkdir()
    (source / "a.gif").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="holds no images: accepted extensions are jpg, jpeg, png"):
        pack_folder(source, tmp_path / "out")
    image_file(source / "cat" / "one.jpg", 0)
    image_file(source / "loose.jpg", 0)
    with pytest.raises(ValueError, match=r"1 images lie in .* itself, the first is loose\.jpg; either all"):
        pack_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_images_without_classes_becomes_shards_without_labels(tmp_path):
    for number in range(5):
        image_file(tmp_path / "images" / f"{number}.jpg", number)
    paths = pack_folder(tmp_path / "images", tmp_path / "out")
    shards = open_shards(str(tmp_path / "out"))
    assert shards.num_samples == 5 and shards.labels(np.arange(5)).tolist() == [-1] * 5
    assert [path.name for path in (tmp_path / "out").iterdir()] == [path.name for path in paths]


def test_validation_shards_use_the_class_numbers_of_training(source, tmp_path):
    pack_folder(source, tmp_path / "train")
    image_file(tmp_path / "val" / "cat" / "1.jpg", 1)
    classes = PackConfig(classes=str(tmp_path / "train" / "classes.json"))
    pack_folder(tmp_path / "val", tmp_path / "out", classes)
    assert open_shards(str(tmp_path / "out")).labels(np.arange(1)).tolist() == [1]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["ant", "cat"]
    image_file(tmp_path / "val" / "dog" / "1.jpg", 1)
    with pytest.raises(ValueError, match=r"must be listed in classes=.*, which lists 2 classes, got \['dog'\]"):
        pack_folder(tmp_path / "val", tmp_path / "other", classes)
