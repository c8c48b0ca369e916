"""Making shards: bytes untouched, the same every time, nothing overwritten, regions of the demonstration set apart."""

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from pipelines import make_shards
from pipelines.config import PackConfig
from pipelines.labels import read_labels
from pipelines.make_shards import (
    DEMO_CROP_SIDE,
    DEMO_PHOTOGRAPHS,
    DEMO_WIDTH,
    DemoShards,
    hue_bin,
    load_photograph,
    pack_folder,
    split_columns,
    write_demo_shards,
)
from pipelines.shards import find_shards, open_shards


def image_file(path: Path, grey: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (grey, grey, grey)).save(path)
    return path


def samples_of(spec: str) -> list[dict]:
    """Read samples as the webdataset library does, but close the files, which it leaves open."""
    samples = []
    for path in find_shards(spec):
        with open(path, "rb") as stream:
            samples += group_by_keys(tar_file_expander([{"url": path, "stream": stream}]))
    return samples


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


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


def test_packed_images_keep_bytes_class_and_name(source, tmp_path):
    paths = pack_folder(source, tmp_path / "out", PackConfig(samples_per_shard=10))
    assert [path.name for path in paths] == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["ant", "cat"]
    packed = samples_of(f"{tmp_path}/out/shard-{{000000..000002}}.tar")
    for sample in packed:
        note = json.loads(sample["json"])
        extension = note["file"].split(".")[-1].lower()
        assert sample[extension] == (source / note["file"]).read_bytes()
        assert ["ant", "cat"][int(sample["cls"])] == note["class"] == note["file"].split("/")[0]
    assert len({json.loads(sample["json"])["file"] for sample in packed}) == 22


def test_packed_shards_pass_our_index_with_unique_keys_without_dots(source, tmp_path):
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
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        write_demo_shards(destination)
    assert digests(destination) == before


def test_a_failure_leaves_nothing_behind(source, tmp_path):
    (source / "cat" / "empty.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"empty\.jpg must be at least 1 byte"):
        pack_folder(source, tmp_path / "out" / "deep")
    assert list((tmp_path / "out").iterdir()) == []


def test_sources_that_are_no_image_folder_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        pack_folder(tmp_path / "none", tmp_path / "out")
    source = tmp_path / "images"
    source.mkdir()
    (source / "a.gif").write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match="holds no images: accepted extensions are jpg, jpeg, png"):
        pack_folder(source, tmp_path / "out")
    image_file(source / "cat" / "one.jpg", 0)
    image_file(source / "loose.jpg", 0)
    with pytest.raises(ValueError, match=r"1 images lie in .* itself, the first is loose\.jpg; either each"):
        pack_folder(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_of_images_without_classes_becomes_shards_without_labels(tmp_path):
    for number in range(5):
        image_file(tmp_path / "images" / f"{number}.jpg", number)
    paths = pack_folder(tmp_path / "images", tmp_path / "out")
    shards = open_shards(str(tmp_path / "out"))
    assert shards.num_samples == 5 and shards.labels(np.arange(5)).tolist() == [-1] * 5
    assert [path.name for path in (tmp_path / "out").iterdir()] == [path.name for path in paths]


def test_validation_shards_take_the_class_numbers_of_training(source, tmp_path):
    pack_folder(source, tmp_path / "train")
    image_file(tmp_path / "val" / "cat" / "1.jpg", 1)
    classes = PackConfig(classes=str(tmp_path / "train" / "classes.json"))
    pack_folder(tmp_path / "val", tmp_path / "out", classes)
    assert open_shards(str(tmp_path / "out")).labels(np.arange(1)).tolist() == [1]
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["ant", "cat"]
    image_file(tmp_path / "val" / "dog" / "1.jpg", 1)
    with pytest.raises(ValueError, match=r"must be named in classes=.*, which lists 2, got \['dog'\]"):
        pack_folder(tmp_path / "val", tmp_path / "other", classes)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> DemoShards:
    return write_demo_shards(tmp_path_factory.mktemp("demo") / "shards")


def folder_of(demo: DemoShards) -> Path:
    return Path(demo.train).parent


def test_demo_has_the_promised_counts_and_equal_classes(demo):
    train, val = open_shards(demo.train), open_shards(demo.val)
    assert [len(shard.keys) for shard in train.shards] == [510] * 8
    assert [len(shard.keys) for shard in val.shards] == [510] * 2
    assert (train.num_samples, val.num_samples) == (demo.num_train, demo.num_val) == (4080, 1020)
    for shards, each in ((train, 240), (val, 60)):
        labels = shards.labels(np.arange(shards.num_samples))
        assert np.bincount(labels).tolist() == [each] * 17 and len(demo.classes) == 17
    # every shard is a mixture: a loader sees few shards at a time
    assert min(len(set(shard.label.tolist())) for shard in train.shards) == 17


def test_the_demo_has_several_tasks_in_its_json(demo):
    train, val = open_shards(demo.train), open_shards(demo.val)
    photograph = read_labels(train, "json.photograph")
    names = [photograph.classes[number] for number in photograph.number]
    assert names == [demo.classes[number] for number in read_labels(train, "cls").number]
    hue = read_labels(val, "json.hue_bin", classes=read_labels(train, "json.hue_bin").classes)
    assert set(hue.classes) <= set("01234567") and (hue.counts > 0).sum() >= 5


def test_a_demo_that_is_there_is_not_written_again(demo, monkeypatch):
    monkeypatch.setattr(make_shards, "_write_shards", lambda *_: pytest.fail("written again"))
    assert write_demo_shards(folder_of(demo)) == demo
    with pytest.raises(FileExistsError):
        write_demo_shards(folder_of(demo), seed=1)


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(make_shards, "DEMO_CROPS", {"train": 8, "val": 2})


@pytest.mark.usefixtures("small_demo")
def test_demo_bytes_depend_on_the_seed_but_not_on_time_and_place(tmp_path):
    write_demo_shards(tmp_path / "one")
    write_demo_shards(tmp_path / "two")
    write_demo_shards(tmp_path / "other", seed=1)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") != digests(tmp_path / "other")


@pytest.mark.usefixtures("small_demo")
def test_an_incomplete_demo_is_not_taken_for_a_whole_one(tmp_path):
    demo = write_demo_shards(tmp_path / "small")
    (tmp_path / "small" / "train-000003.tar").unlink()
    with pytest.raises(FileExistsError):
        write_demo_shards(tmp_path / "small")
    assert demo.num_train == 8 * 17


def test_training_and_validation_columns_are_disjoint_and_complete():
    for width in (DEMO_WIDTH, 5, 101):
        train, val = split_columns(width, "train"), split_columns(width, "val")
        assert [*train, *val] == list(range(width))
    assert len(split_columns(DEMO_WIDTH, "val")) >= DEMO_CROP_SIDE[1]


@pytest.mark.parametrize("split", ["train", "val"])
def test_demo_crops_show_the_pixels_of_their_own_region(demo, split):
    photographs = {Path(path).stem: load_photograph(path) for path in DEMO_PHOTOGRAPHS}
    for sample in samples_of({"train": demo.train, "val": demo.val}[split])[::5]:
        note = json.loads(sample["json"])
        photograph, size = photographs[note["photograph"]], note["size"]
        assert demo.classes[int(sample["cls"])] == note["photograph"]
        columns = split_columns(photograph.shape[1], split)
        left = columns.start + round(note["x"] * len(columns) - size / 2)
        top = round(note["y"] * len(photograph) - size / 2)
        assert columns.start <= left and left + size <= columns.stop
        image = np.asarray(Image.open(io.BytesIO(sample["jpg"])))
        assert image.shape == (size, size, 3) and DEMO_CROP_SIDE[0] <= size <= DEMO_CROP_SIDE[1]
        shown = photograph[top : top + size, left : left + size]
        # JPEG of quality 90 with halved chroma stays this near; any other place of a texture does not
        assert np.abs(image.astype(float) - shown).mean() < 8
        assert note["hue_bin"] == hue_bin(shown)


def test_hue_bins_tell_colours_apart_and_grey_is_its_own():
    colours = {
        "grey": (90, 90, 90),
        "red": (255, 0, 0),
        "green": (0, 255, 0),
        "blue": (0, 0, 255),
        "cyan": (0, 255, 255),
    }
    bins = {name: hue_bin(np.full((4, 4, 3), colour, np.uint8)) for name, colour in colours.items()}
    assert bins["grey"] == 0
    assert len(set(bins.values())) == 5 and all(0 <= number <= 7 for number in bins.values())


def test_a_photograph_that_is_not_installed_is_named():
    with pytest.raises(FileNotFoundError, match=r"skimage/data/none\.png is not installed.*pip install"):
        load_photograph("skimage/data/none.png")
    with pytest.raises(FileNotFoundError, match="is not installed"):
        load_photograph("no_such_package/none.png")
