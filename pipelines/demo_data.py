"""The demonstration shards: crops of photographs from installed packages, with labels and segmentation maps."""

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
from iwm_fast.pipelines.storage.shard_writer import make_sample, publish_folder, write_shards

# Colour photographs first, then grey textures and scenes. Not used: diagrams, near duplicates, and pictures of the
# packages that are blurred or almost empty.
DEMO_PHOTOGRAPHS = (
    *(f"skimage/data/{name}.png" for name in ("astronaut", "chelsea", "coffee", "ihc", "motorcycle_left")),
    *(f"skimage/data/{name}.jpg" for name in ("hubble_deep_field", "retina", "rocket")),
    *(f"sklearn/datasets/images/{name}.jpg" for name in ("china", "flower")),
    *(f"skimage/data/{name}.png" for name in ("brick", "camera", "coins", "grass", "gravel", "moon", "page")),
)
# Width of the photographs in pixels. The validation region, the right two fifths, just holds the largest crop, so that
# both regions have crops of the same sizes. At twice this width, many crops would be smooth patches of one colour.
DEMO_WIDTH = 240
DEMO_TRAIN_SHARE = 0.6
DEMO_CROP_SIDE = (48, 96)
"""Smallest and largest side of the square crops, in pixels."""
DEMO_CROPS = {"train": 240, "val": 60}
"""Number of crops of each photograph."""
DEMO_SHARDS = {"train": 8, "val": 2}
DEMO_JPEG_QUALITY = 90
# Below this mean chroma (of 255), a crop looks grey and its hue is noise.
GREY_CHROMA = 6.0
# The same for a single pixel, whose JPEG noise is not averaged out.
GREY_PIXEL_CHROMA = 12.0
REGIONS = ("shadow", "grey", "light", "brown", "warm", "green", "blue")
"""Classes of the segmentation maps, in the order of their numbers."""
# Standard deviation in pixels. The blur removes texture, so that regions follow objects.
REGION_BLUR = 3.0


@dataclass(frozen=True, kw_only=True)
class DemoShards:
    """The demonstration set, whose classes are the photographs that its crops come from."""

    train: str
    """Pattern of the training shards."""
    val: str
    """Pattern of the validation shards."""
    num_train: int
    """Number of training samples."""
    num_val: int
    """Number of validation samples."""
    classes: tuple[str, ...]
    """Name of each class's photograph."""


def write_demo_shards(destination: Path, seed: int = 0) -> DemoShards:
    """Write the demonstration set, unless it already exists with the same parameters.

    Training crops come from the left three fifths of each photograph, validation crops from the rest. `.json` members
    hold the name of the photograph, `hue_bin` (the crop's mean hue, 1 to 7, or 0 for grey), `quadrant` (the quarter of
    the region that contains the crop's centre), `size` (side of the crop in pixels), and `x` and `y` (centre of the
    crop as a share of the region's width and height). `.seg.png` members hold the same crop of `region_map`.

    Raises:
        FileExistsError: if the destination holds anything else.
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
    """Return a description of the set as JSON, without its path, so that the folder may be moved."""
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
    path = folder / "demo.json"
    is_complete = len(list(folder.glob("*.tar"))) == sum(DEMO_SHARDS.values())
    return is_complete and path.exists() and path.read_text() == manifest


def load_photograph(path: str, width: int | None = DEMO_WIDTH) -> UInt8[np.ndarray, "H W 3"]:
    """Load a photograph from an installed package and resize it.

    Args:
        path: package and path of the file within it, as in "skimage/data/coffee.png".
        width: in pixels; None keeps the size of the file.

    Raises:
        FileNotFoundError: if the package is not installed or does not contain the file.
    """
    package, path_in_package = path.split("/", 1)
    # The package is located without importing it: importing sklearn alone would take a second.
    spec = importlib.util.find_spec(package)
    folders = (spec and spec.submodule_search_locations) or []
    file = next((Path(folder, path_in_package) for folder in folders if Path(folder, path_in_package).exists()), None)
    if file is None:
        raise FileNotFoundError(f"photograph {path} is not installed: pip install 'iwm-fast[demo]'")
    with Image.open(file) as image:
        size = (width, round(image.height * width / image.width)) if width else image.size
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.LANCZOS))


def split_columns(width: int, split: str) -> range:
    """Return the columns of a photograph that belong to a split: "train" is the left three fifths, "val" the rest."""
    border = round(width * DEMO_TRAIN_SHARE)
    return range(border) if split == "train" else range(border, width)


def _chroma(rgb: np.ndarray) -> Any:
    """Return I and Q of YIQ, computed over the last axis. The hue transform rotates in the plane that they span."""
    red, green, blue = np.moveaxis(rgb.astype(np.float64), -1, 0)
    return 0.596 * red - 0.274 * green - 0.321 * blue, 0.211 * red - 0.523 * green + 0.311 * blue


def hue_bin(crop: UInt8[np.ndarray, "H W 3"]) -> int:
    """Return the seventh of the hue circle, 1 .. 7, that contains a crop's mean hue, or 0 if the crop is grey.

    Angles count from +I (orange), so that the many warm photographs lie on both sides of a border between two bins
    instead of in a single bin.
    """
    in_phase, quadrature = _chroma(crop.reshape(-1, 3).mean(axis=0))
    if np.hypot(in_phase, quadrature) < GREY_CHROMA:
        return 0
    return 1 + int(np.arctan2(quadrature, in_phase) % (2 * np.pi) / (2 * np.pi) * 7)


def region_map(photograph: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W"]:
    """Return the number in `REGIONS` of each pixel of a photograph, computed after a blur.

    A grey pixel is shadow, grey or light, depending on its third of the brightness range. The hue makes other pixels
    brown or warm (purple to yellow, below and above half brightness), green or blue. The map needs no annotation, and
    its quality can be judged by eye.
    """
    blurred = np.asarray(Image.fromarray(photograph).filter(ImageFilter.GaussianBlur(REGION_BLUR)))
    in_phase, quadrature = _chroma(blurred)
    angle = np.degrees(np.arctan2(quadrature, in_phase)) % 360
    brightness = blurred.mean(axis=-1)
    # Angles in degrees from +I (orange) towards purple: blue from 95, green from 190 (near cyan), yellow from 290.
    is_warm = (angle > 290) | (angle < 95)
    colour = np.select([is_warm & (brightness < 128), is_warm, angle > 190], [3, 4, 5], 6)
    is_grey = np.hypot(in_phase, quadrature) < GREY_PIXEL_CHROMA
    return np.where(is_grey, np.minimum(brightness // 85, 2), colour).astype(np.uint8)


def _demo_samples(photographs: list[np.ndarray], names: tuple[str, ...], split: str, seed: int) -> Iterator[dict]:
    """Yield the samples of a split in random order, so that each shard holds crops of all photographs."""
    count = DEMO_CROPS[split]
    numbers = np.arange(count * len(names))
    draws = uniforms(seed, f"demo {split}", 0, numbers, 3)
    order = np.argsort(random_bits(seed, f"demo order {split}", numbers), kind="stable")
    regions = [region_map(photograph) for photograph in photographs]
    for position, number in enumerate(order):
        label = int(number) // count
        photograph = photographs[label]
        columns = split_columns(photograph.shape[1], split)
        window, location = _crop_window((len(photograph), len(columns)), draws[number])
        crop, mask = (array[:, columns.start : columns.stop][window] for array in (photograph, regions[label]))
        metadata = {"photograph": names[label], "hue_bin": hue_bin(crop), **location}
        images = {"jpg": _encode(crop, "JPEG", quality=DEMO_JPEG_QUALITY), "seg.png": _encode(mask, "PNG")}
        yield make_sample(f"{split}_{position:06d}", label, metadata, images)


def _crop_window(region: tuple[int, int], draw: np.ndarray) -> tuple[tuple[slice, slice], dict[str, int | float]]:
    """Return a square crop as slices and its entries of the `.json` member.

    Args:
        region: height and width of the region in pixels.
        draw: three uniform numbers in [0, 1), which determine area, top and left.
    """
    min_side, max_side = DEMO_CROP_SIDE
    # The area is uniform, not the side.
    side = round(float(np.sqrt(min_side**2 + draw[0] * (max_side**2 - min_side**2))))
    height, width = region
    top, left = int(draw[1] * (height - side + 1)), int(draw[2] * (width - side + 1))
    x, y = (left + side / 2) / width, (top + side / 2) / height
    location = {"size": side, "x": x, "y": y, "quadrant": 2 * int(y >= 0.5) + int(x >= 0.5)}
    return (slice(top, top + side), slice(left, left + side)), location


def _encode(pixels: np.ndarray, format_name: str, **options: int) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format_name, **options)
    return encoded.getvalue()
