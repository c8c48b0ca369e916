"""The demonstration shards: counts, labels, disjoint regions of training and validation, and maps that match."""

import functools
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixtures.tar_files import digests, samples_of
from iwm_fast.pipelines import demo_data
from iwm_fast.pipelines.annotations.labels import read_labels
from iwm_fast.pipelines.counter_rng import uniforms
from iwm_fast.pipelines.demo_data import (
    DEMO_BACKGROUNDS,
    DEMO_CANDIDATES,
    DEMO_CROP_SIDE,
    DEMO_PHOTOGRAPHS,
    DEMO_WIDTH,
    DemoShards,
    draw_crop,
    draw_outline,
    enrich_colours,
    hue_bin,
    load_photograph,
    paste,
    split_columns,
    turn_hue,
    write_demo_shards,
)
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.color_map import LUMA

# One process draws the demo's images once for all tests.
pytestmark = pytest.mark.xdist_group("demo_data")


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> DemoShards:
    return write_demo_shards(tmp_path_factory.mktemp("demo") / "shards")


cached_photograph = functools.cache(load_photograph)


def folder_of(demo: DemoShards) -> Path:
    return Path(demo.train).parent


def test_the_demo_has_the_documented_counts_and_balanced_classes(demo):
    train, val = open_shards(demo.train), open_shards(demo.val)
    assert [len(shard.keys) for shard in train.shards] == [510] * 8
    assert [len(shard.keys) for shard in val.shards] == [510] * 2
    assert str(demo).splitlines() == [
        f"{demo.train}: images 4,080, classes 17", f"{demo.val}: images 1,020, classes 17"
    ]  # fmt: skip
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
    backgrounds = read_labels(train, "json.background")
    assert set(backgrounds.classes) == {demo.classes[number] for number in DEMO_BACKGROUNDS}
    assert backgrounds.counts.min() > 200 and read_labels(train, "json.quadrant").counts.min() > 800


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
    monkeypatch.setattr(demo_data, "load_photograph", cached_photograph)


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


@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize("is_link", [False, True])
def test_images_of_another_version_are_kept_under_another_name(tmp_path, caplog, is_link):
    real = tmp_path / ("disk" if is_link else "demo")
    if is_link:
        (tmp_path / "demo").symlink_to(real)
    for version in (1, 0):
        for path in real.iterdir() if real.exists() else []:
            path.unlink()
        real.mkdir(exist_ok=True)
        (real / "demo.json").write_text(json.dumps({"seed": 0, "width": version}))
        (real / "train-000000.tar").write_text("old")
        caplog.clear()
        demo = write_demo_shards(tmp_path / "demo")
        old = real.with_name(f"{real.name}.old" + ("" if version else "-2"))
        assert f"{tmp_path / 'demo'} holds the images of another version" in caplog.text and str(old) in caplog.text
        assert json.loads((old / "demo.json").read_text())["width"] == version
        assert (old / "train-000000.tar").read_text() == "old" and (tmp_path / "demo").is_symlink() == is_link
        assert open_shards(demo.train).num_samples == demo.num_train
    caplog.clear()
    assert write_demo_shards(tmp_path / "demo") == demo and not caplog.text


@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize("manifest", ['{"seed": 1}', "[0]", "{", '{"recipe": 1}'])
def test_a_folder_with_another_manifest_is_not_touched(tmp_path, manifest):
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "demo.json").write_text(manifest)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        write_demo_shards(folder)
    assert (folder / "demo.json").read_text() == manifest and list(tmp_path.iterdir()) == [folder]


def test_training_and_validation_columns_are_disjoint_and_complete():
    for width in (DEMO_WIDTH, 5, 101):
        train, val = split_columns(width, "train"), split_columns(width, "val")
        assert [*train, *val] == list(range(width))
    assert len(split_columns(DEMO_WIDTH, "val")) >= DEMO_CROP_SIDE[1]


@pytest.mark.usefixtures("small_demo")
@pytest.mark.parametrize("split", ["train", "val"])
def test_images_show_two_photographs_where_their_map_says_so_and_only_their_split(tmp_path, monkeypatch, split):
    def paint(path: str) -> np.ndarray:
        """Return a photograph whose red is its number and whose green is its split."""
        photograph = np.zeros((120, DEMO_WIDTH, 3), np.uint8)
        photograph[..., 0] = 15 * DEMO_PHOTOGRAPHS.index(path)
        photograph[:, split_columns(DEMO_WIDTH, "val"), 1] = 200
        return photograph

    monkeypatch.setattr(demo_data, "load_photograph", paint)
    monkeypatch.setattr(demo_data, "enrich_colours", lambda photograph, _: photograph)
    monkeypatch.setattr(demo_data, "turn_hue", lambda crop, _: crop)
    demo = write_demo_shards(tmp_path / "shards")
    for sample in samples_of({"train": demo.train, "val": demo.val}[split]):
        metadata, label = json.loads(sample["json"]), int(sample["cls"])
        image = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).astype(float)
        mask = np.asarray(Image.open(io.BytesIO(sample["seg.png"])))
        background = demo.classes.index(metadata["background"])
        assert demo.classes[label] == metadata["photograph"] and set(np.unique(mask)) == {label, background}
        assert background in DEMO_BACKGROUNDS and background != label
        assert image.shape == (metadata["size"], metadata["size"], 3)
        assert DEMO_CROP_SIDE[0] <= metadata["size"] <= DEMO_CROP_SIDE[1]
        # Chroma of a JPEG is subsampled, so that colours mix for a few pixels around the outline.
        assert np.median(np.abs(image[..., 0] - 15.0 * mask)) < 5
        assert np.abs(image[..., 1] - (200 if split == "val" else 0)).max() < 60
        # The pasted part lies around its centre, and it covers neither everything nor nothing.
        y, x = np.argwhere(mask == label).mean(axis=0) / len(mask)
        assert abs(x - metadata["x"]) < 0.15 and abs(y - metadata["y"]) < 0.15
        assert 0.08 < (mask == label).mean() < 0.6
        assert metadata["quadrant"] == 2 * (metadata["y"] >= 0.5) + (metadata["x"] >= 0.5)


def test_almost_all_images_are_colourful(demo):
    coloured = []
    for sample in samples_of(demo.val)[::3]:
        pixels = np.asarray(Image.open(io.BytesIO(sample["jpg"]))).astype(int)
        coloured.append((np.ptp(pixels, axis=-1) > 30).mean())
    assert np.mean(np.array(coloured) > 0.1) > 0.95 and np.median(coloured) > 0.6


def test_colours_are_enriched_without_a_change_of_brightness_and_grey_gets_a_tone():
    luma = np.array([0.299, 0.587, 0.114])
    colour, grey = np.full((2, 2, 3), (120, 100, 90), np.uint8), np.full((2, 2, 3), 110, np.uint8)
    enriched, toned = enrich_colours(colour), enrich_colours(grey, (205, 95, 65))
    assert np.ptp(enriched[0, 0]) == 45 and enriched[0, 0] @ luma == pytest.approx(colour[0, 0] @ luma, abs=1)
    assert toned[0, 0] / toned[0, 0].max() == pytest.approx(np.array([205, 95, 65]) / 205, abs=0.01)
    assert toned[0, 0] @ luma == pytest.approx(110, abs=1)
    assert (enrich_colours(grey) == grey).all()


def test_the_hue_of_a_crop_is_turned_in_both_directions_and_its_brightness_stays():
    crop = np.full((2, 2, 3), (140, 100, 90), np.uint8)
    turned = np.array([turn_hue(crop, uniform)[0, 0] for uniform in (0.0, 0.5, 0.999)])
    assert (turned[1] == crop[0, 0]).all() and abs(turned[0] - turned[2].astype(int)).max() > 30
    assert turned @ np.array(LUMA) == pytest.approx(crop[0, 0] @ np.array(LUMA), abs=1)


def test_the_crop_with_the_most_colour_is_used():
    chroma = np.zeros((120, 144), np.uint8)
    chroma[:, 100:] = 50
    draws = uniforms(0, "crops", 0, np.arange(200), 3 * DEMO_CANDIDATES)
    chosen, first = ([draw_crop(chroma, draw[:count]) for draw in draws] for count in (None, 3))
    assert np.mean([chroma[crop].mean() for crop in chosen]) > 2 * np.mean([chroma[crop].mean() for crop in first])
    for rows, columns in chosen:
        assert rows.stop <= 120 and columns.stop <= 144
        assert DEMO_CROP_SIDE[0] <= rows.stop - rows.start == columns.stop - columns.start <= DEMO_CROP_SIDE[1]


def test_an_outline_is_closed_smooth_and_antialiased():
    for draw in uniforms(0, "outlines", 0, np.arange(20), 9):
        inside, (x, y) = draw_outline(64, draw)
        assert inside[int(64 * y), int(64 * x)] == 1 and inside.min() == 0
        # The border is one pixel wide on average; without antialiasing there would be none.
        is_border = (inside > 0) & (inside < 1)
        assert 0.4 < is_border.sum() / (np.abs(np.diff(inside > 0.5, axis=0)).sum() * 2) < 2
        # Rays from the centre cross the outline once.
        rows = (inside > 0.5)[int(64 * y)]
        assert np.abs(np.diff(rows.astype(int))).sum() <= 2


def test_a_part_is_scaled_to_its_outline_and_blended_on_it():
    inside = np.zeros((20, 20))
    inside[4:12, 6:16], inside[4, 6:16] = 1, 0.25
    gradient = np.repeat(np.linspace(0, 200, 40).astype(np.uint8)[:, None, None], 40, axis=1).repeat(3, axis=2)
    image = paste(gradient, np.full((20, 20, 3), 240, np.uint8), inside)
    assert (image[inside == 0] == 240).all()
    column = image[4:12, 10, 0].astype(float)
    # A quarter of the part's dark edge, then the gradient, stretched over ten pixels of which eight are seen.
    assert column[0] == pytest.approx(0.75 * 240, abs=5) and column[1] < 50
    assert np.diff(column[1:]) == pytest.approx(20, abs=6)


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
