"""The demonstration shards: counts, labels, disjoint regions of training and validation, and matching masks."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixtures.tar_files import digests, samples_of
from iwm_fast.pipelines import demo_data
from iwm_fast.pipelines.annotations.labels import read_labels
from iwm_fast.pipelines.annotations.segmentation import read_mask
from iwm_fast.pipelines.demo_data import (
    DEMO_CROP_SIDE,
    DEMO_PHOTOGRAPHS,
    DEMO_WIDTH,
    REGIONS,
    DemoShards,
    hue_bin,
    load_photograph,
    region_map,
    split_columns,
    write_demo_shards,
)
from iwm_fast.pipelines.storage.reader import FileCache
from iwm_fast.pipelines.storage.shard_set import open_shards

# One process draws the demo's images once for all tests.
pytestmark = pytest.mark.xdist_group("demo_data")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> DemoShards:
    return write_demo_shards(tmp_path_factory.mktemp("demo") / "shards")


def folder_of(demo: DemoShards) -> Path:
    return Path(demo.train).parent


def test_the_demo_has_the_documented_counts_and_balanced_classes(demo):
    train, val = open_shards(demo.train), open_shards(demo.val)
    assert [len(shard.keys) for shard in train.shards] == [510] * 8
    assert [len(shard.keys) for shard in val.shards] == [510] * 2
    assert (train.num_samples, val.num_samples) == (demo.num_train, demo.num_val) == (4080, 1020)
    for shards, crops_per_class in ((train, 240), (val, 60)):
        labels = shards.labels(np.arange(shards.num_samples))
        assert np.bincount(labels).tolist() == [crops_per_class] * 17 and len(demo.classes) == 17
    # All shards hold all classes, because a loader mixes only a few shards at a time.
    assert min(len(set(shard.label.tolist())) for shard in train.shards) == 17


def test_the_json_members_hold_several_labels(demo):
    train, val = open_shards(demo.train), open_shards(demo.val)
    photograph = read_labels(train, "json.photograph")
    names = [photograph.classes[number] for number in photograph.number]
    assert names == [demo.classes[number] for number in read_labels(train, "cls").number]
    hue = read_labels(val, "json.hue_bin", classes=read_labels(train, "json.hue_bin").classes)
    assert set(hue.classes) <= set("01234567") and (hue.counts > 0).sum() >= 5


def test_a_folder_with_other_files_is_not_changed(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        write_demo_shards(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_existing_demo_is_not_written_again(demo, monkeypatch):
    monkeypatch.setattr(demo_data, "write_shards", lambda *_: pytest.fail("written again"))
    assert write_demo_shards(folder_of(demo)) == demo
    with pytest.raises(FileExistsError):
        write_demo_shards(folder_of(demo), seed=1)


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(demo_data, "DEMO_CROPS", {"train": 8, "val": 2})


@pytest.mark.usefixtures("small_demo")
def test_the_bytes_of_the_demo_depend_only_on_the_seed(tmp_path):
    write_demo_shards(tmp_path / "one")
    write_demo_shards(tmp_path / "two")
    write_demo_shards(tmp_path / "other", seed=1)
    assert digests(tmp_path / "one") == digests(tmp_path / "two") != digests(tmp_path / "other")


@pytest.mark.usefixtures("small_demo")
def test_an_incomplete_demo_is_refused(tmp_path):
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
def test_demo_crops_show_the_pixels_of_their_region(demo, split):
    photographs = {Path(path).stem: load_photograph(path) for path in DEMO_PHOTOGRAPHS}
    for sample in samples_of({"train": demo.train, "val": demo.val}[split])[::5]:
        metadata = json.loads(sample["json"])
        photograph, size = photographs[metadata["photograph"]], metadata["size"]
        assert demo.classes[int(sample["cls"])] == metadata["photograph"]
        columns = split_columns(photograph.shape[1], split)
        left = columns.start + round(metadata["x"] * len(columns) - size / 2)
        top = round(metadata["y"] * len(photograph) - size / 2)
        assert columns.start <= left and left + size <= columns.stop
        image = np.asarray(Image.open(io.BytesIO(sample["jpg"])))
        assert image.shape == (size, size, 3) and DEMO_CROP_SIDE[0] <= size <= DEMO_CROP_SIDE[1]
        expected = photograph[top : top + size, left : left + size]
        # JPEG of quality 90 with subsampled chroma stays this close; another part of a texture does not.
        assert np.abs(image.astype(float) - expected).mean() < 8
        assert metadata["hue_bin"] == hue_bin(expected)
        assert metadata["quadrant"] == 2 * (metadata["y"] >= 0.5) + (metadata["x"] >= 0.5)
        mask = np.asarray(Image.open(io.BytesIO(sample["seg.png"])))
        assert np.array_equal(mask, region_map(photograph)[top : top + size, left : left + size])


def test_the_masks_are_valid_segmentation_maps_and_show_all_classes(demo):
    shards, files = open_shards(demo.val), FileCache()
    masks = [read_mask(shards, files, sample) for sample in range(0, shards.num_samples, 7)]
    files.close()
    assert set(np.concatenate([mask.ravel() for mask in masks])) == set(range(len(REGIONS)))


def test_regions_follow_brightness_and_colour():
    colours = {
        "shadow": (20, 20, 20), "grey": (120, 120, 120), "light": (240, 240, 240), "brown": (120, 60, 20),
        "warm": (250, 140, 60), "green": (40, 160, 40), "blue": (40, 60, 200),
    }  # fmt: skip
    for name, colour in colours.items():
        assert (region_map(np.full((9, 9, 3), colour, np.uint8)) == REGIONS.index(name)).all(), name


def test_hue_bins_separate_colours_and_grey():
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
