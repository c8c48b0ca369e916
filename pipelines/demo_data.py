"""The demonstration shards: parts of photographs pasted onto others, with labels and segmentation maps.

The photographs come with installed packages.
"""

import importlib.util
import io
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image

from iwm_fast.pipelines.counter_rng import random_bits, uniforms
from iwm_fast.pipelines.storage.atomic import set_aside
from iwm_fast.pipelines.storage.shard_writer import make_sample, publish_folder, write_shards
from iwm_fast.pipelines.transforms.color_map import LUMA, jitter_map

log = logging.getLogger(__name__)

# Colour photographs first, then grey textures and scenes. Not used: diagrams, near duplicates, and pictures of the
# packages that are blurred or almost empty.
DEMO_PHOTOGRAPHS = (
    *(f"skimage/data/{name}.png" for name in ("astronaut", "chelsea", "coffee", "ihc", "motorcycle_left")),
    *(f"skimage/data/{name}.jpg" for name in ("hubble_deep_field", "retina", "rocket")),
    *(f"sklearn/datasets/images/{name}.jpg" for name in ("china", "flower")),
    *(f"skimage/data/{name}.png" for name in ("brick", "camera", "coins", "grass", "gravel", "moon", "page")),
)
# Colours (red, green, blue) in which grey photographs are toned, because a change of hue or saturation does not change
# grey. The page stays grey.
DEMO_TONES = {
    "brick": (205, 95, 65),
    "camera": (190, 140, 90),
    "coins": (200, 150, 60),
    "grass": (110, 170, 60),
    "gravel": (190, 150, 110),
    "moon": (90, 130, 200),
}
# Not used as backgrounds: what is black, or has few colours and little structure.
DEMO_BACKGROUNDS = tuple(
    number
    for number, path in enumerate(DEMO_PHOTOGRAPHS)
    if Path(path).stem not in ("hubble_deep_field", "camera", "moon", "page")
)
DEMO_SATURATION = 1.5
"""Factor of the colour photographs' saturation."""
# Width of the photographs in pixels. The validation region, the right two fifths, just holds the largest crop, so that
# both regions have crops of the same sizes. At twice this width, many crops would be smooth patches of one colour.
DEMO_WIDTH = 240
DEMO_TRAIN_SHARE = 0.6
DEMO_CROP_SIDE = (48, 96)
"""Smallest and largest side of the square crops, in pixels."""
DEMO_HUE_TURNS = 0.15
"""Largest rotation of a crop's hue, in turns, so that a photograph's colours are not always the same."""
# Of so many random crops, the most colourful one is used.
DEMO_CANDIDATES = 4
DEMO_CROPS = {"train": 240, "val": 60}
"""Number of images into which each photograph is pasted."""
DEMO_SHARDS = {"train": 8, "val": 2}
DEMO_JPEG_QUALITY = 90
# Version of everything that determines the images, for the manifest: to be raised when the same seed gives others.
DEMO_RECIPE = 2
# Of the outline: range of its centre and of its mean radius as shares of the image's side, and the largest amplitudes
# of its waves as shares of the radius, by their number in a turn.
OUTLINE_CENTRE = (0.3, 0.7)
OUTLINE_RADIUS = (0.25, 0.36)
OUTLINE_WAVES = {2: 0.22, 3: 0.16, 5: 0.1}
# Below this mean chroma (of 255), an image looks grey and its hue is noise.
GREY_CHROMA = 6.0


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

    def __str__(self) -> str:
        counts = {self.train: self.num_train, self.val: self.num_val}
        return "\n".join(f"{shards}: images {count:,}, classes {len(self.classes)}" for shards, count in counts.items())


def write_demo_shards(destination: Path, seed: int = 0) -> DemoShards:
    """Write the demonstration set, unless it already exists with the same parameters.

    Each image is a crop of a photograph, the background, onto which a part of another photograph is pasted. The part
    has an irregular outline. `enrich_colours` and `draw_crop` make both colourful. Training images show the left three
    fifths of the photographs, validation images the rest.

    `.cls` members hold the number of the pasted photograph. `.json` members hold the names `photograph`, which is
    pasted, and `background`; `hue_bin` (the image's mean hue, 1 to 7, or 0 for grey); `size` (side of the image in
    pixels); `x` and `y` (centre of the pasted part as a share of the side); and `quadrant` (the quarter of the image
    that contains this centre). `.seg.png` members hold, for each pixel, the number of the photograph that it shows.

    A set that another version has written with this seed is renamed, with a warning.

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
    # Without the path, so that the folder may be moved.
    counts = {"num_train": demo.num_train, "num_val": demo.num_val, "num_shards": DEMO_SHARDS}
    manifest = {"recipe": DEMO_RECIPE, "seed": seed, **counts, "classes": list(names)}
    existing = _read_manifest(destination)
    is_complete = len(list(destination.glob("*.tar"))) == sum(DEMO_SHARDS.values())
    if is_complete and existing == manifest:
        return demo
    photographs = [enrich_colours(load_photograph(path), DEMO_TONES.get(Path(path).stem)) for path in DEMO_PHOTOGRAPHS]
    if existing != manifest and existing.get("seed") == seed:
        old = set_aside(destination.resolve(), "old")
        problem = "%s holds the images of another version of the demo. They are now in %s, which may be deleted"
        log.warning(problem + "; new images are being written", destination, old)
    with publish_folder(destination) as staging:
        for split, num_shards in DEMO_SHARDS.items():
            samples = _demo_samples(photographs, names, split, seed)
            write_shards(staging / split, samples, num_samples[split] // num_shards)
        (staging / "demo.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return demo


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the description of the set in a folder, empty if there is none."""
    try:
        manifest = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


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


def enrich_colours(
    photograph: UInt8[np.ndarray, "H W 3"], tone: tuple[int, int, int] | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Return a photograph with more saturated colours, or a grey one in shades of a tone (red, green, blue)."""
    luma = (photograph @ np.array(LUMA))[..., None]
    in_colour = photograph if tone is None else luma * tone / np.dot(tone, LUMA)
    saturation = DEMO_SATURATION if tone is None else 1
    return np.clip(np.round(luma + saturation * (in_colour - luma)), 0, 255).astype(np.uint8)


def split_columns(width: int, split: str) -> range:
    """Return the columns of a photograph that belong to a split: "train" is the left three fifths, "val" the rest."""
    border = round(width * DEMO_TRAIN_SHARE)
    return range(border) if split == "train" else range(border, width)


def hue_bin(image: UInt8[np.ndarray, "H W 3"]) -> int:
    """Return the seventh of the hue circle, 1 .. 7, that contains an image's mean hue, or 0 if the image is grey.

    Angles count from +I (orange), so that the many warm images lie on both sides of a border between two bins instead
    of in a single bin.
    """
    red, green, blue = image.reshape(-1, 3).mean(axis=0)
    # I and Q of YIQ: the hue transform rotates in the plane that they span.
    in_phase, quadrature = 0.596 * red - 0.274 * green - 0.321 * blue, 0.211 * red - 0.523 * green + 0.311 * blue
    if np.hypot(in_phase, quadrature) < GREY_CHROMA:
        return 0
    return 1 + int(np.arctan2(quadrature, in_phase) % (2 * np.pi) / (2 * np.pi) * 7)


def _demo_samples(photographs: list[np.ndarray], names: tuple[str, ...], split: str, seed: int) -> Iterator[dict]:
    """Yield the samples of a split in random order, so that each shard holds images of all classes."""
    count = DEMO_CROPS[split]
    numbers = np.arange(count * len(names))
    draws = uniforms(seed, f"demo {split}", 0, numbers, 12)
    part_draws, background_draws = (
        uniforms(seed, f"demo {role} {split}", 0, numbers, 3 * DEMO_CANDIDATES) for role in ("part", "background")
    )
    order = np.argsort(random_bits(seed, f"demo order {split}", numbers), kind="stable")
    regions = [photograph[:, split_columns(photograph.shape[1], split)] for photograph in photographs]
    chromas = [np.ptp(region, axis=-1) for region in regions]
    for position, number in enumerate(order):
        label, draw = int(number) // count, draws[number]
        backgrounds = [background for background in DEMO_BACKGROUNDS if background != label]
        background = backgrounds[int(draw[0] * len(backgrounds))]
        part = regions[label][draw_crop(chromas[label], part_draws[number])]
        behind = regions[background][draw_crop(chromas[background], background_draws[number])]
        inside, (x, y) = draw_outline(len(behind), draw[1:10])
        part, behind = (turn_hue(crop, uniform) for crop, uniform in zip((part, behind), draw[10:], strict=True))
        image = paste(part, behind, inside)
        metadata = {
            "photograph": names[label],
            "background": names[background],
            "hue_bin": hue_bin(image),
            "size": len(image),
            "x": x,
            "y": y,
            "quadrant": 2 * int(y >= 0.5) + int(x >= 0.5),
        }
        mask = np.where(inside >= 0.5, label, background).astype(np.uint8)
        images = {"jpg": _encode(image, "JPEG", quality=DEMO_JPEG_QUALITY), "seg.png": _encode(mask, "PNG")}
        yield make_sample(f"{split}_{position:06d}", label, metadata, images)


def draw_crop(chroma: UInt8[np.ndarray, "H W"], draw: np.ndarray) -> tuple[slice, slice]:
    """Return the rows and columns of the square crop with the most colour among some random ones.

    Args:
        chroma: for each pixel, the difference between its largest and its smallest channel.
        draw: three uniform numbers in [0, 1) for each of the crops, which determine its area, top and left.
    """
    crops = []
    min_side, max_side = DEMO_CROP_SIDE
    for area, *place in draw.reshape(-1, 3):
        # The area is uniform, not the side.
        side = round(float(np.sqrt(min_side**2 + area * (max_side**2 - min_side**2))))
        top, left = (int(share * (length - side + 1)) for share, length in zip(place, chroma.shape, strict=True))
        crops.append((slice(top, top + side), slice(left, left + side)))
    return max(crops, key=lambda crop: chroma[crop].mean())


def turn_hue(crop: UInt8[np.ndarray, "side side 3"], uniform: float) -> UInt8[np.ndarray, "side side 3"]:
    """Return a crop whose hue is rotated as in jitter, by an angle that a uniform number in [0, 1) determines."""
    one = np.ones(1, np.float32)
    turns = np.full(1, DEMO_HUE_TURNS * (2 * uniform - 1), np.float32)
    matrix = jitter_map(brightness=one, contrast=one, saturation=one, hue=turns).matrix[0]
    return np.clip(np.round(crop @ matrix.T), 0, 255).astype(np.uint8)


def draw_outline(side: int, draw: np.ndarray) -> tuple[Float64[np.ndarray, "side side"], tuple[float, float]]:
    """Return how much of each pixel lies inside of a random smooth outline, 0 to 1, and the outline's centre.

    Args:
        side: side of the image in pixels.
        draw: nine uniform numbers in [0, 1), which determine centre, mean radius, and the waves' amplitudes and phases.

    Returns:
        The shares, and x and y of the centre as shares of the side.
    """
    x, y = (OUTLINE_CENTRE[0] + float(uniform) * (OUTLINE_CENTRE[1] - OUTLINE_CENTRE[0]) for uniform in draw[:2])
    radius = side * (OUTLINE_RADIUS[0] + draw[2] * (OUTLINE_RADIUS[1] - OUTLINE_RADIUS[0]))
    rows, columns = np.mgrid[:side, :side] + 0.5
    down, right = rows - y * side, columns - x * side
    angle = np.arctan2(down, right)
    reach = np.full_like(angle, radius)
    for (num_waves, most), amplitude, phase in zip(OUTLINE_WAVES.items(), draw[3:6], draw[6:], strict=True):
        reach += radius * most * amplitude * np.cos(num_waves * angle + 2 * np.pi * phase)
    # A pixel that the outline crosses lies inside of it in part, so that no steps are visible.
    return np.clip(reach - np.hypot(down, right) + 0.5, 0, 1), (x, y)


def paste(
    part: UInt8[np.ndarray, "_ _ 3"],
    background: UInt8[np.ndarray, "side side 3"],
    inside: Float64[np.ndarray, "side side"],
) -> UInt8[np.ndarray, "side side 3"]:
    """Return the background with a square part, scaled to the size of the outline, where pixels are inside of it."""
    rows, columns = (np.flatnonzero(inside.any(axis=axis)) for axis in (1, 0))
    height, width = rows[-1] + 1 - rows[0], columns[-1] + 1 - columns[0]
    scaled = Image.fromarray(part).resize((max(height, width),) * 2, Image.Resampling.LANCZOS)
    window = np.ix_(rows, columns)
    image = background.copy()
    weight = inside[window][..., None]
    blend = weight * np.asarray(scaled)[:height, :width] + (1 - weight) * background[window]
    image[window] = np.round(blend).astype(np.uint8)
    return image


def _encode(pixels: np.ndarray, format_name: str, **options: int) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format_name, **options)
    return encoded.getvalue()
