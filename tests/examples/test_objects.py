"""Objects on photographs, made from imitations of the packages: what is left out, and what training does not show."""

import importlib.util
import io
import json
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from fixtures.paths import PROJECT

spec = importlib.util.spec_from_file_location("objects", PROJECT / "examples" / "objects.py")
objects = importlib.util.module_from_spec(spec)
sys.modules["objects"] = objects
spec.loader.exec_module(objects)


def noise(height, width, seed) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def save_cut_out(path, seed, *, is_drawing=False):
    """Save a picture that is opaque in its middle half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((40, 60, 4), np.uint8)
    pixels[10:30, 15:45, :3] = 200 if is_drawing else noise(20, 30, seed)
    pixels[10:30, 15:45, 3] = 255
    Image.fromarray(pixels).save(path)


@pytest.fixture
def photographs(tmp_path):
    # Folders of drawings are told apart below this one only.
    folder = tmp_path / "toys" / "photographs"
    for number, path in enumerate(objects.KINDS.values()):
        for index in range(4):
            save_cut_out(folder / objects.STAMPS / path / f"thing{index}.png", 10 * number + index)
    mammals = folder / objects.STAMPS / objects.KINDS["mammal"]
    save_cut_out(mammals / "flat.png", 0, is_drawing=True)
    save_cut_out(mammals / "cartoon" / "cat.png", 1)
    save_cut_out(mammals / "thing0_mirror.png", 2)
    backgrounds = folder / "usr/share/backgrounds"
    backgrounds.mkdir(parents=True)
    for index in range(4):
        Image.fromarray(noise(80, 120, 100 + index)).save(backgrounds / f"scene{index}.png")
    Image.fromarray(noise(80, 120, 1)).save(backgrounds / "scene4-l.png")
    Image.fromarray(noise(80, 120, 2)).save(backgrounds / "scene4-d.png")
    Image.fromarray(np.full((80, 120, 3), 90, np.uint8)).save(backgrounds / "logo.png")
    wallpaper = folder / "usr/share/wallpapers/Sea/contents/images"
    wallpaper.mkdir(parents=True)
    for size in ("120x80", "60x40"):
        Image.fromarray(noise(80, 120, 3)).save(wallpaper / f"{size}.png")
    Image.fromarray(noise(80, 120, 4)).save(wallpaper.parent / "screenshot.png")
    return folder


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(objects, "NUM_IMAGES", {"train": 70, "val": 14})
    monkeypatch.setattr(objects, "IMAGES_PER_SHARD", 35)
    monkeypatch.setattr(objects, "FEW", (1, 3))
    monkeypatch.setattr(objects, "NUM_DRAWS", 2)


def read(path) -> list[dict]:
    """Return the samples of a shard by extension."""
    samples: dict[str, dict] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            key, _, extension = member.name.partition(".")
            samples.setdefault(key, {"key": key})[extension] = archive.extractfile(member).read()
    return list(samples.values())


def shown_objects(*shards) -> set:
    """Return the objects, with their kinds, and the backgrounds that shards show."""
    entries = [json.loads(sample["json"]) for path in shards for sample in read(path)]
    return {(entry["kind"], entry["object"]) for entry in entries} | {entry["background"] for entry in entries}


def test_drawings_variants_and_other_sizes_are_left_out(photographs):
    names = {
        kind: [picture.name for picture in pictures] for kind, pictures in objects.load_objects(photographs).items()
    }
    assert names["mammal"] == ["thing0", "thing1", "thing2", "thing3"]
    assert objects.load_objects(photographs)["bird"][0].pixels.shape == (20, 30, 4)
    backgrounds = [picture.name for picture in objects.load_backgrounds(photographs)]
    assert backgrounds == ["Sea", "scene0", "scene1", "scene2", "scene3", "scene4"]


def test_validation_shows_what_training_does_not_and_the_same_seed_gives_the_same_bytes(photographs, tmp_path, small):
    for name in ("first", "second"):
        objects.write_objects(photographs, tmp_path / name)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*.*"))
    assert len(files) == 2 + 1 + 2 * 2 + 1
    assert all((tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes() for file in files)
    shown = {part: set() for part in ("train", "val")}
    for part in ("train", "val"):
        samples = [sample for path in sorted((tmp_path / "first").glob(f"{part}-*")) for sample in read(path)]
        labels = [int(sample["cls"]) for sample in samples]
        assert np.bincount(labels).tolist() == [objects.NUM_IMAGES[part] // 7] * 7
        metadata = [json.loads(sample["json"]) for sample in samples]
        assert [list(objects.KINDS)[label] for label in labels] == [entry["kind"] for entry in metadata]
        shown[part] = shown_objects(*(tmp_path / "first").glob(f"{part}-*"))
        for label, sample in zip(labels, samples, strict=True):
            mask = np.asarray(Image.open(io.BytesIO(sample["seg.png"])))
            assert mask.shape == (64, 64) and set(np.unique(mask)) == {0, label + 1}
    assert not shown["train"] & shown["val"]
    objects.write_objects(photographs, tmp_path / "pilot", for_pilot=True)
    pilot = shown_objects(*(tmp_path / "pilot").glob("*-*.tar"))
    assert pilot and pilot <= shown["train"]
    one, three = (read(tmp_path / "first" / "few" / f"{count}-per-kind-000001.tar") for count in (1, 3))
    assert [len(one), len(three)] == [7, 21] and {s["key"] for s in one} < {s["key"] for s in three}
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        objects.write_objects(photographs, tmp_path / "first")


def test_the_object_lies_where_the_mask_and_the_metadata_say():
    cut_out = objects.Picture(name="red", pixels=np.full((20, 40, 4), (255, 0, 0, 255), np.uint8))
    background = objects.Picture(name="blue", pixels=np.full((100, 150, 3), (0, 0, 255), np.uint8))
    for draw in np.random.default_rng(0).random((20, 7)):
        image, opacity, metadata = objects.draw_image(cut_out, background, draw)
        assert np.array_equal(image[..., 0] > 127, opacity >= 0.5)
        rows, columns = np.nonzero(opacity >= 0.5)
        assert (columns.max() + 1 - columns.min()) / 64 == metadata["size"]
        assert np.mean([rows.min(), rows.max() + 1]) / 64 == metadata["y"]
        assert np.mean([columns.min(), columns.max() + 1]) / 64 == metadata["x"]
        assert metadata["hue_bin"] == objects.hue_bin(background.pixels)


def test_a_folder_without_the_packages_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no cut-outs in .*mammals; run examples/debian_photographs\.sh"):
        objects.write_objects(tmp_path, tmp_path / "out")
