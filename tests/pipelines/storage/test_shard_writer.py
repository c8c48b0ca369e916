"""Packing shards: image bytes do not change, the result is reproducible, and nothing is overwritten."""

import json
import os
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
    (packed_set,) = pack_folder(source, tmp_path / "out", PackConfig(samples_per_shard=10))
    assert str(packed_set) == f"{tmp_path / 'out'}: images 22, classes 2, shards 3"
    assert [path.name for path in packed_set.shards] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
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
    (packed,) = pack_folder(source, tmp_path / "100% of {a,b}: x", PackConfig(samples_per_shard=30))
    (path,) = packed.shards
    assert open_shards(str(path)).num_samples == 22


def test_nothing_is_overwritten(source, tmp_path):
    destination = tmp_path / "out"
    pack_folder(source, destination)
    before = digests(destination)
    with pytest.raises(FileExistsError, match=r"holds 1 shards.*nothing is overwritten"):
        pack_folder(source, destination)
    assert digests(destination) == before


def test_a_failure_leaves_no_files(source, tmp_path):
    (source / "cat" / "empty.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"1 files or folders cannot be packed; remove(.|\n)*empty\.jpg is empty"):
        pack_folder(source, tmp_path / "out" / "deep")
    assert not (tmp_path / "out").exists()


def test_all_files_are_on_the_disk_before_the_folder_gets_its_name(source, tmp_path, monkeypatch):
    synced, fsync = {}, os.fsync

    def record(descriptor):
        synced[os.readlink(f"/proc/self/fd/{descriptor}")] = (tmp_path / "out").exists()
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    pack_folder(source, tmp_path / "out", PackConfig(samples_per_shard=10, val_share=0.2))
    written = [path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")]
    staging = tmp_path / ".out.unfinished" / "shards"
    assert len(written) == 7 and synced == {
        **{str(staging / path): False for path in written}, str(staging): False, str(tmp_path): True
    }  # fmt: skip


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
    (packed,) = pack_folder(tmp_path / "images", tmp_path / "out")
    shards = open_shards(str(tmp_path / "out"))
    assert shards.num_samples == 5 and shards.labels(np.arange(5)).tolist() == [-1] * 5
    assert list((tmp_path / "out").iterdir()) == list(packed.shards) and packed.num_classes == 0


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


def files_of(folder: Path) -> set[str]:
    """Return the source files of the samples in a folder of shards."""
    return {json.loads(sample["json"])["file"] for sample in samples_of(f"{folder}/shard-000000.tar")}


def class_counts(folder: Path) -> list[int]:
    shards = open_shards(str(folder))
    return np.bincount(shards.labels(np.arange(shards.num_samples))).tolist()


def test_a_validation_share_is_drawn_from_each_class(source, tmp_path):
    image_file(source / "bee" / "single.png", 1)
    for number in range(2):
        image_file(source / "dog" / f"{number}.png", number)
    share = PackConfig(val_share=0.3)
    train, val = pack_folder(source, tmp_path / "out", share)
    assert class_counts(train.folder) == [8, 1, 8, 1] and class_counts(val.folder) == [3, 0, 3, 1]
    assert not files_of(train.folder) & files_of(val.folder)
    assert len(files_of(train.folder) | files_of(val.folder)) == 25
    names = ["ant", "bee", "cat", "dog"]
    assert [json.loads((packed.folder / "classes.json").read_text()) for packed in (train, val)] == [names, names]
    assert str(val) == f"{tmp_path / 'out' / 'val'}: images 7, classes 3, shards 1"
    pack_folder(source, tmp_path / "again", share)
    assert digests(tmp_path / "again" / "val") == digests(val.folder)
    pack_folder(source, tmp_path / "other", share, seed=1)
    assert files_of(tmp_path / "other" / "val") != files_of(val.folder)


def test_one_image_of_each_class_stays_in_train_at_any_share(source, tmp_path):
    pack_folder(source, tmp_path / "out", PackConfig(val_share=0.99))
    assert class_counts(tmp_path / "out" / "train") == [1, 1]


def test_images_without_classes_can_be_divided(tmp_path):
    for number in range(10):
        image_file(tmp_path / "images" / f"{number}.jpg", number)
    train, val = pack_folder(tmp_path / "images", tmp_path / "out", PackConfig(val_share=0.2))
    assert (train.num_images, val.num_images) == (8, 2)
    assert sorted(path.name for path in (tmp_path / "out" / "val").iterdir()) == ["shard-000000.tar"]


def test_train_and_val_folders_get_the_class_numbers_of_train(source, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    source.rename(both / "train")
    image_file(both / "val" / "cat" / "1.jpg", 1)
    train, val = pack_folder(both, tmp_path / "out")
    assert class_counts(train.folder) == [11, 11] and class_counts(val.folder) == [0, 1]
    for packed in (train, val):
        assert json.loads((packed.folder / "classes.json").read_text()) == ["ant", "cat"]
    pack_folder(both / "train", tmp_path / "alone")
    assert open_shards(str(train.folder)).content_digest == open_shards(str(tmp_path / "alone")).content_digest
    with pytest.raises(ValueError, match=r"val_share must be unset for .*both/val, got 0\.1"):
        pack_folder(both, tmp_path / "other", PackConfig(val_share=0.1))
    (both / "train" / "emu").mkdir()
    for name in ("dog", "emu"):
        image_file(both / "val" / name / "1.jpg", 1)
    with pytest.raises(ValueError, match=r"no images of 2 classes of .*val: \['dog', 'emu'\]; add training images"):
        pack_folder(both, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_train_and_val_folders_that_do_not_match_are_refused(source, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    source.rename(both / "train")
    image_file(both / "val" / "1.jpg", 1)
    with pytest.raises(ValueError, match=r"both/train has class folders, but .*both/val has none; sort"):
        pack_folder(both, tmp_path / "out")
    (both / "test").mkdir()
    with pytest.raises(ValueError, match=r"holds the folders train and val, but also test; move"):
        pack_folder(both, tmp_path / "out")


def test_train_and_val_folders_without_classes_are_packed(tmp_path):
    for name in ("train/1.jpg", "train/2.jpg", "val/3.jpg"):
        image_file(tmp_path / "both" / name, 1)
    train, val = pack_folder(tmp_path / "both", tmp_path / "out")
    assert (train.num_images, val.num_images, val.num_classes) == (2, 1, 0)


def test_both_sets_are_written_or_none(source, tmp_path):
    both = tmp_path / "both"
    both.mkdir()
    source.rename(both / "train")
    image_file(both / "val" / "cat" / "1.jpg", 1).write_bytes(b"")
    with pytest.raises(ValueError, match=r"1\.jpg is empty"):
        pack_folder(both, tmp_path / "out" / "deep")
    assert not (tmp_path / "out").exists()
    image_file(both / "val" / "cat" / "1.jpg", 1)
    pack_folder(both, tmp_path / "out" / "deep")
    with pytest.raises(FileExistsError, match="holds 2 shards"):
        pack_folder(both, tmp_path / "out" / "deep")


def test_a_validation_share_that_leaves_a_set_empty_is_refused(tmp_path):
    image_file(tmp_path / "images" / "cat" / "1.jpg", 1)
    with pytest.raises(ValueError, match=r"which has no class with two images, got 0\.5"):
        pack_folder(tmp_path / "images", tmp_path / "out", PackConfig(val_share=0.5))
    for share in (-0.1, 1.0):
        with pytest.raises(ValueError, match="val_share must be at least 0 and below 1"):
            PackConfig(val_share=share)


TABLE = 'file,class,place\ncat/a b.1.JPG,tom,in\nant/deep/ü2.png,queen,\ncat/a b.3.JPG,tom,"out, far"\n'


def packed_from_table(source: Path, folder: Path, table: str, **settings) -> list[dict]:
    """Pack the images of a table, and return the content of the samples' `.json` members by file, with label."""
    (folder / "labels.csv").write_text(table, encoding="utf-8")
    pack_folder(source, folder / "out", PackConfig(labels=str(folder / "labels.csv"), **settings))
    samples = samples_of(f"{folder}/out/shard-000000.tar")
    return sorted(
        (json.loads(sample["json"]) | {"label": sample.get("cls", b"").decode()} for sample in samples),
        key=lambda sample: sample["file"],
    )


def test_a_table_gives_images_classes_and_further_fields(source, tmp_path):
    assert packed_from_table(source, tmp_path, TABLE) == [
        {"file": "ant/deep/ü2.png", "class": "queen", "place": "", "label": "0"},
        {"file": "cat/a b.1.JPG", "class": "tom", "place": "in", "label": "1"},
        {"file": "cat/a b.3.JPG", "class": "tom", "place": "out, far", "label": "1"},
    ]
    assert json.loads((tmp_path / "out" / "classes.json").read_text(encoding="utf-8")) == ["queen", "tom"]


def test_a_table_without_classes_gives_samples_without_labels(source, tmp_path):
    (sample,) = packed_from_table(source, tmp_path, "file\ncat/a b.1.JPG\n")
    assert sample == {"file": "cat/a b.1.JPG", "label": ""} and not (tmp_path / "out" / "classes.json").exists()


def test_a_table_takes_the_class_numbers_of_training(source, tmp_path):
    (tmp_path / "classes.json").write_text('["none", "queen", "tom"]')
    samples = packed_from_table(source, tmp_path, TABLE, classes=str(tmp_path / "classes.json"))
    assert [sample["label"] for sample in samples] == ["1", "2", "2"]
    (tmp_path / "few.json").write_text('["tom"]')
    config = PackConfig(labels=str(tmp_path / "labels.csv"), classes=str(tmp_path / "few.json"))
    with pytest.raises(ValueError, match=r"labels\.csv must be listed in classes=.*few\.json, .* got \['queen'\]"):
        pack_folder(source, tmp_path / "b", config)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("path,class\na.jpg,b\n", r"the header of .*labels\.csv must name each column once, and have one named file"),
        ("", r"the header of .*labels\.csv must name each column once"),
        ("file,file\na,b\n", r"the header of .* must name each column once"),
        ("file,class\ncat/a b.1.JPG\n", r"labels\.csv, line 2 must have 2 columns"),
        ("file,class\ncat/a b.1.JPG,x,y\n", r"labels\.csv, line 2 must have 2 columns"),
        ("file,class\ncat/a b.1.JPG,\n", r"labels\.csv, line 2: class must name a class"),
        ("file\n/etc/a.jpg\n", r"line 2: file must be the path of an image in the image folder, got '/etc/a\.jpg'"),
        ("file\n../a.jpg\n", r"line 2: file must be the path of an image in the image folder"),
        ("file\ncat/a b.1.JPG\ncat/a b.1.JPG\n", r"line 3: file must be listed only once, got 'cat/a b\.1\.JPG'"),
        ('file\n"cat', r"must be a CSV table in UTF-8 with a header: unexpected end of data"),
        ("file\ncat/none.jpg\nant/notes.txt\n", r"(?s)2 files or folders cannot be packed; .*none\.jpg cannot be read "
         r"\(No such file or directory\).*notes\.txt does not have the extension of an image"),
        ("file,class\n", r"labels=.* lists no image that can be packed"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_is_refused_with_its_line(source, tmp_path, table, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        packed_from_table(source, tmp_path, table)
    assert not (tmp_path / "out").exists()


def write_maps(source: Path, folder: Path) -> None:
    for path in [*source.rglob("*.JPG"), *source.rglob("*.png")]:
        target = (folder / path.relative_to(source)).with_suffix(".png")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 7).save(target)


def test_segmentation_maps_are_packed_beside_their_images(source, tmp_path):
    write_maps(source, tmp_path / "maps")
    pack_folder(source, tmp_path / "out", PackConfig(maps=str(tmp_path / "maps")))
    samples = samples_of(f"{tmp_path}/out/shard-000000.tar")
    expected = (tmp_path / "maps" / "cat" / "a b.1.png").read_bytes()
    assert len(samples) == 22 and all(sample["seg.png"] == expected for sample in samples)
    assert open_shards(str(tmp_path / "out")).shards[0].mask_size.tolist() == [len(expected)] * 22


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:30])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, r"a b\.1\.JPG has no segmentation map .*maps/cat/a b\.1\.png"),
        (cut, r"a b\.1\.JPG has a segmentation map, .*a b\.1\.png, which "),
        (lambda path: Image.new("L", (8, 9)).save(path), r"needs a segmentation map of 8 x 8 pixels.*is 8 x 9 pixels"),
    ],
)
def test_a_map_that_does_not_fit_its_image_is_named(source, tmp_path, damage, message):
    write_maps(source, tmp_path / "maps")
    damage(tmp_path / "maps" / "cat" / "a b.1.png")
    with pytest.raises(ValueError, match=rf"(?s)1 files or folders cannot be packed; .*{message}"):
        pack_folder(source, tmp_path / "out", PackConfig(maps=str(tmp_path / "maps")))
    assert not (tmp_path / "out").exists()


def test_maps_and_smaller_images_are_not_packed_together():
    with pytest.raises(ValueError, match=r"shorter must be unset with maps=; .*iwm shards resize"):
        PackConfig(maps="a", shorter=64)
