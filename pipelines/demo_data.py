"""The demonstration shards: crops of photographs that are already installed, with labels and segmentation maps."""

import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter

from iwm_fast.pipelines.counter_rng import random_bits, uniforms
from iwm_fast.pipelines.storage.shard_writer import publish_folder, shard_sample, write_shards

# Colour first; the grey ones are textures or scenes. Left out: diagrams, blurred or nearly empty pictures, twins.
DEMO_PHOTOGRAPHS = (
    *(f"skimage/data/{name}.png" for name in ("astronaut", "chelsea", "coffee", "ihc", "motorcycle_left")),
    *(f"skimage/data/{name}.jpg" for name in ("hubble_deep_field", "retina", "rocket")),
    *(f"sklearn/datasets/images/{name}.jpg" for name in ("china", "flower")),
    *(f"skimage/data/{name}.png" for name in ("brick", "camera", "coins", "grass", "gravel", "moon", "page")),
)
# the right two fifths of this width take the largest crop, so both regions know the same sizes; at twice the width a
# crop shows so little of a photograph that it is a smooth patch of one colour
DEMO_WIDTH = 240
DEMO_TRAIN_SHARE = 0.6
DEMO_CROP_SIDE = (48, 96)
DEMO_CROPS = {"train": 240, "val": 60}
"""Crops of each photograph."""
DEMO_SHARDS = {"train": 8, "val": 2}
DEMO_JPEG_QUALITY = 90
# below this mean chroma (of 255) a crop looks grey and its hue is noise
GREY_CHROMA = 6.0
# of one pixel, where JPEG's noise has not been averaged out
GREY_PIXEL_CHROMA = 12.0
REGIONS = ("shadow", "grey", "light", "brown", "warm", "green", "blue")
"""Classes of the segmentation maps, in the order of their numbers."""
# pixels of DEMO_WIDTH: regions are things, not their texture
REGION_BLUR = 3.0


@dataclass(frozen=True, kw_only=True)
class DemoShards:
    """The demonstration set: crops of installed photographs; the class is the photograph."""

    train: str
    """Pattern of the training shards."""
    val: str
    """Pattern of the validation shards."""
    num_train: int
    num_val: int
    classes: tuple[str, ...]
    """Name of each label's photograph."""


def write_demo_shards(destination: Path, seed: int = 0) -> DemoShards:
    """Write the demonstration set, or do nothing if it is already there with the same parameters.

    Training crops come from the left three fifths of each photograph, validation crops from the rest.
    `.json` members hold photograph, hue_bin (see `hue_bin`), quadrant (which quarter of its region the crop's centre
    lies in), size (side of the crop in pixels), x and y (centre of the crop as a share of its region's width and
    height). `.seg.png` members hold `region_map` at the same place.

    Raises:
        FileExistsError: if the destination holds something else.
        FileNotFoundError: if a photograph is not installed.
    """
    names = tuple(Path(path).stem for path in DEMO_PHOTOGRAPHS)
    num_samples = {split: count * len(names) for split, count in DEMO_CROPS.items()}
    demo = DemoShards(
        train=f"{destination}/train-{{000000..{DEMO_SHARDS['train'] - 1:06d}}}.tar",
        val=f"{destination}/val-{{000000..{DEMO_SHARDS['val'] - 1:06d}}}.tar",
        num_train=num_samples["train"],
        num_val=num_samples["val"],
        classes=names,
    )
    manifest = _demo_manifest(demo, seed)
    if _holds_demo(destination, manifest):
        return demo
    with publish_folder(destination) as staging:
        photographs = [load_photograph(path) for path in DEMO_PHOTOGRAPHS]
        for split, num_shards in DEMO_SHARDS.items():
            samples = _demo_samples(photographs, names, split, seed)
            write_shards(staging / split, samples, num_samples[split] // num_shards)
        (staging / "demo.json").write_text(manifest)
    return demo


def _demo_manifest(demo: DemoShards, seed: int) -> str:
    """Describe the set without its place, so that it may be moved."""
    recipe = {
        "seed": seed,
        "width": DEMO_WIDTH,
        "train_share": DEMO_TRAIN_SHARE,
        "crop_side": DEMO_CROP_SIDE,
        "jpeg_quality": DEMO_JPEG_QUALITY,
        "regions": REGIONS,
        "region_blur": REGION_BLUR,
    }
    counts = {"num_train": demo.num_train, "num_val": demo.num_val, "num_shards": DEMO_SHARDS}
    return json.dumps({**recipe, **counts, "classes": demo.classes}, indent=1) + "\n"


def _holds_demo(folder: Path, manifest: str) -> bool:
    file = folder / "demo.json"
    is_whole = len(list(folder.glob("*.tar"))) == sum(DEMO_SHARDS.values())
    return is_whole and file.exists() and file.read_text() == manifest


def load_photograph(path: str) -> UInt8[np.ndarray, "H W 3"]:
    """Load a photograph from an installed package, at most `DEMO_WIDTH` pixels wide; path is package/folders/file.

    Raises:
        FileNotFoundError: if the package does not bring it.
    """
    package, inside = path.split("/", 1)
    # found without importing: sklearn alone would take a second
    found = importlib.util.find_spec(package)
    folders = (found and found.submodule_search_locations) or []
    file = next((Path(folder, inside) for folder in folders if Path(folder, inside).exists()), None)
    if file is None:
        raise FileNotFoundError(f"photograph {path} is not installed: pip install scikit-image scikit-learn")
    with Image.open(file) as image:
        height = round(image.height * DEMO_WIDTH / image.width)
        return np.asarray(image.convert("RGB").resize((DEMO_WIDTH, height), Image.Resampling.LANCZOS))


def split_columns(width: int, split: str) -> range:
    """Return the columns of a photograph that belong to "train" or "val": the left three fifths and the rest."""
    border = round(width * DEMO_TRAIN_SHARE)
    return range(border) if split == "train" else range(border, width)


def _chroma(rgb: np.ndarray) -> Any:
    """Return I and Q of YIQ over the last axis, the plane in which the hue transform turns."""
    red, green, blue = np.moveaxis(rgb.astype(np.float64), -1, 0)
    return 0.596 * red - 0.274 * green - 0.321 * blue, 0.211 * red - 0.523 * green + 0.311 * blue


def hue_bin(crop: UInt8[np.ndarray, "H W 3"]) -> int:
    """Return 0 for a crop without clear colour, else 1 .. 7: the seventh of the hue circle its mean chroma points to.

    Angles count from +I (orange), so that the many warm photographs fall on both sides of a border instead of into one
    bin.
    """
    in_phase, quadrature = _chroma(crop.reshape(-1, 3).mean(axis=0))
    if np.hypot(in_phase, quadrature) < GREY_CHROMA:
        return 0
    return 1 + int(np.arctan2(quadrature, in_phase) % (2 * np.pi) / (2 * np.pi) * 7)


def region_map(photograph: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W"]:
    """Cut a photograph into regions: each pixel's number in `REGIONS`, of the blurred photograph.

    Without clear colour a pixel is shadow, grey or light by its thirds of brightness; otherwise, by its chroma, brown
    or warm (purple to yellow, below and above half brightness), green or blue. No annotation is needed, and whoever
    looks can see whether it is right.
    """
    blurred = np.asarray(Image.fromarray(photograph).filter(ImageFilter.GaussianBlur(REGION_BLUR)))
    in_phase, quadrature = _chroma(blurred)
    angle = np.degrees(np.arctan2(quadrature, in_phase)) % 360
    brightness = blurred.mean(axis=-1)
    # +I is orange; yellow-green begins where I no longer outweighs -Q, blue on the far side of cyan
    is_warm = (angle > 290) | (angle < 95)
    colour = np.select([is_warm & (brightness < 128), is_warm, angle > 190], [3, 4, 5], 6)
    is_grey = np.hypot(in_phase, quadrature) < GREY_PIXEL_CHROMA
    return np.where(is_grey, np.minimum(brightness // 85, 2), colour).astype(np.uint8)


def _demo_samples(photographs: list[np.ndarray], names: tuple[str, ...], split: str, seed: int) -> Iterator[dict]:
    count = DEMO_CROPS[split]
    numbers = np.arange(count * len(names))
    draws = uniforms(seed, f"demo {split}", 0, numbers, 3)
    order = np.argsort(random_bits(seed, f"demo order {split}", numbers), kind="stable")
    regions = [region_map(photograph) for photograph in photographs]
    for place, number in enumerate(order):
        label = int(number) // count
        photograph = photographs[label]
        columns = split_columns(photograph.shape[1], split)
        window, where = _window((len(photograph), len(columns)), draws[number])
        crop, mask = (whole[:, columns.start : columns.stop][window] for whole in (photograph, regions[label]))
        note = {"photograph": names[label], "hue_bin": hue_bin(crop), **where}
        images = {"jpg": _encode(crop, "JPEG", quality=DEMO_JPEG_QUALITY), "seg.png": _encode(mask, "PNG")}
        yield shard_sample(f"{split}_{place:06d}", label, note, images)


def _window(region: tuple[int, int], draw: np.ndarray) -> tuple[tuple[slice, slice], dict[str, int | float]]:
    """Return a square within a region of some height and width; three uniform numbers decide its area and place."""
    smallest, largest = DEMO_CROP_SIDE
    side = round(float(np.sqrt(smallest**2 + draw[0] * (largest**2 - smallest**2))))
    height, width = region
    top, left = int(draw[1] * (height - side + 1)), int(draw[2] * (width - side + 1))
    x, y = (left + side / 2) / width, (top + side / 2) / height
    where = {"size": side, "x": x, "y": y, "quadrant": 2 * int(y >= 0.5) + int(x >= 0.5)}
    return (slice(top, top + side), slice(left, left + side)), where


def _encode(pixels: np.ndarray, kind: str, **options: int) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, kind, **options)
    return encoded.getvalue()
