"""Objects on photographs: shards whose labels do not depend on colour, made of pictures that Debian's packages contain.

    examples/debian_photographs.sh photographs
    python examples/objects.py photographs data/objects
    python examples/objects.py photographs data/objects_pilot --pilot
    python examples/objects.py photographs data/objects --sheet sheet.png

Each image shows a cut-out of an animal, a plant or a tool, scaled, perhaps mirrored, at a random place, on a crop of a
background. Validation images show objects and backgrounds that training images do not show. The images are a function
of the seed and of the versions of the packages.

    objects/train-{000000..000007}.tar, val-{000000..000001}.tar
    objects/few/3-per-kind-{000000..000009}.tar    ten draws of 3 images of each kind; also 1, 10, 30 and 100
    objects/objects.json                           names of kinds, objects and backgrounds

A sample has `.jpg`; `.cls`, the kind; `.seg.png`, 1 + kind where the object is and 0 elsewhere; and `.json` with
`kind`, `object`, `background`, `hue_bin` (the background's mean hue, 1 to 7, or 0 for grey), and, as shares of the
image's side, `x` and `y` (the object's centre) and `size` (its longer side).
"""

import argparse
import io
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from iwm_fast.pipelines.counter_rng import random_bits, uniforms
from iwm_fast.pipelines.demo_data import hue_bin
from iwm_fast.pipelines.storage.shard_writer import make_sample, publish_folder, write_shards

STAMPS = "usr/share/tuxpaint/stamps"
KINDS = {
    "mammal": "animals/mammals",
    "bird": "animals/birds",
    "fish": "animals/fish",
    "flower": "plants/flowers",
    "fruit": "food/fruit",
    "vegetable": "food/vegetables",
    "tool": "household/tools",
}
"""Folder of each kind's cut-outs."""
DRAWINGS = {"cartoon", "toys", "plastic"}
"""Folders whose pictures do not show the objects themselves."""
BACKGROUNDS = ("usr/share/backgrounds/**/*.*", "usr/share/wallpapers/*/contents/images/*")
# The same picture in other colours or mirrored, so that it cannot be in training and in validation.
VARIANTS = re.compile(r".*-d|Ubuntu-Mate-(Cold|Warm)-no-logo|.*_mirror")
"""Names of pictures that are left out."""
# Drawings have areas of a single colour, and logos few colours.
MAX_FLAT_SHARE = 0.5
"""Largest share of horizontally adjacent pixels, both opaque, that have the same colour; others are drawings."""
MIN_COLOURS = 500
"""Smallest number of a background's colours, counted with 5 bits for each channel."""

SIDE = 64
"""Side of the images in pixels."""
BACKGROUND_HEIGHT = 256
"""Shorter side in pixels to which backgrounds are scaled before they are cropped."""
CROP_SHARE = (0.35, 1.0)
"""Smallest and largest side of a background's crop as a share of its shorter side."""
OBJECT_SHARE = (0.45, 0.85)
"""Smallest and largest longer side of an object as a share of the image's side."""
VAL_SHARE = 0.25
"""Share of the objects of each kind, and of the backgrounds, that only validation images show."""
NUM_IMAGES = {"train": 8000, "val": 2000}
IMAGES_PER_SHARD = 1000
FEW = (1, 3, 10, 30, 100)
NUM_DRAWS = 10
JPEG_QUALITY = 92


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A cut-out or a background."""

    name: str
    pixels: UInt8[np.ndarray, "H W C"]
    """Red, green, blue and, for a cut-out, opacity."""


def flat_share(pixels: UInt8[np.ndarray, "H W 4"]) -> float:
    """Return the share of horizontally adjacent opaque pixels that have the same colour, 1 if none are opaque."""
    opaque = pixels[..., 3] == 255
    pairs = opaque[:, 1:] & opaque[:, :-1]
    same = (pixels[:, 1:, :3] == pixels[:, :-1, :3]).all(axis=-1)
    return float(same[pairs].mean()) if pairs.any() else 1.0


def num_colours(pixels: UInt8[np.ndarray, "H W 3"]) -> int:
    """Return the number of colours, with 5 bits for each channel."""
    return len(np.unique((pixels.reshape(-1, 3) >> 3).astype(np.int32) @ [1, 32, 1024]))


def load_objects(folder: Path) -> dict[str, list[Picture]]:
    """Return the photographic cut-outs of each kind, cropped to what is not transparent, sorted by name.

    Raises:
        FileNotFoundError: if the packages are not unpacked in the folder.
    """
    objects: dict[str, list[Picture]] = {}
    for kind, path in KINDS.items():
        objects[kind] = []
        for file in sorted((folder / STAMPS / path).rglob("*.png")):
            if DRAWINGS & set(file.relative_to(folder).parts) or VARIANTS.fullmatch(file.stem):
                continue
            image = Image.open(file).convert("RGBA")
            if flat_share(np.asarray(image)) < MAX_FLAT_SHARE:
                image = image.crop(image.getchannel("A").getbbox())
                # Resized once, to about the largest size in which it is pasted: twice as fast as from the file's size.
                image.thumbnail((2 * SIDE, 2 * SIDE), Image.Resampling.LANCZOS)
                objects[kind].append(Picture(name=file.stem, pixels=np.asarray(image)))
        if len(objects[kind]) < 2:
            raise FileNotFoundError(f"no cut-outs in {folder / STAMPS / path}; run examples/debian_photographs.sh")
    return objects


def load_backgrounds(folder: Path) -> list[Picture]:
    """Return the backgrounds that are not drawings, one of each picture, sorted by name.

    Raises:
        FileNotFoundError: if the packages are not unpacked in the folder.
    """
    pictures: dict[str, Picture] = {}
    files = (file for pattern in BACKGROUNDS for file in sorted(folder.glob(pattern)))
    for file in files:
        # Wallpapers of Plasma lie in a folder each: <name>/contents/images/<size>.jpg.
        is_sized = re.fullmatch(r"\d+x\d+", file.stem) is not None
        name = file.parts[-4] if is_sized else re.sub(r"(_\d+x\d+|-l)$", "", file.stem)
        is_image = file.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp") and not file.is_symlink()
        if not is_image or VARIANTS.fullmatch(name) or name in pictures:
            continue
        image = Image.open(file).convert("RGBA")
        # Measured at one size, because noise and steps disappear in smaller images.
        image = _scale(image, 720)
        pixels = np.asarray(image)
        if flat_share(pixels) < MAX_FLAT_SHARE and num_colours(pixels[..., :3]) >= MIN_COLOURS:
            pictures[name] = Picture(name=name, pixels=np.asarray(_scale(image, BACKGROUND_HEIGHT).convert("RGB")))
    if len(pictures) < 2:
        raise FileNotFoundError(f"no backgrounds in {folder}; run examples/debian_photographs.sh")
    return [pictures[name] for name in sorted(pictures)]


def _scale(image: Image.Image, shorter: int) -> Image.Image:
    factor = shorter / min(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.LANCZOS) if factor < 1 else image


def split(pictures: list[Picture], name: str, part: str, seed: int) -> list[Picture]:
    """Return the pictures of a part, "train" or "val"; `name` names the random stream."""
    order = np.argsort(random_bits(seed, f"objects {name}", np.arange(len(pictures))), kind="stable")
    num_val = max(1, round(VAL_SHARE * len(pictures)))
    return [pictures[index] for index in sorted(order[:num_val] if part == "val" else order[num_val:])]


def draw_image(cut_out: Picture, background: Picture, draw: np.ndarray) -> tuple[np.ndarray, np.ndarray, dict]:
    """Return an image (side, side, 3), the object's opacity (side, side) and the metadata.

    Args:
        cut_out: the object.
        background: the picture on which it is pasted.
        draw: seven uniform numbers in [0, 1): side, top and left of the crop; size, mirrored or not, x and y.
    """
    shorter = min(background.pixels.shape[:2])
    side = round(shorter * (CROP_SHARE[0] + draw[0] * (CROP_SHARE[1] - CROP_SHARE[0])))
    top, left = (
        int(share * (length - side + 1)) for share, length in zip(draw[1:3], background.pixels.shape, strict=False)
    )
    crop = Image.fromarray(background.pixels[top : top + side, left : left + side])
    scene = np.asarray(crop.resize((SIDE, SIDE), Image.Resampling.LANCZOS))
    image = scene.astype(np.float64)

    pixels = cut_out.pixels[:, ::-1] if draw[4] < 0.5 else cut_out.pixels
    size = SIDE * (OBJECT_SHARE[0] + draw[3] * (OBJECT_SHARE[1] - OBJECT_SHARE[0]))
    height, width = (max(1, round(size * length / max(pixels.shape[:2]))) for length in pixels.shape[:2])
    # Pillow resizes colours weighted with opacity, so that hidden colours do not show at the edge.
    scaled = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS))
    row, column = int(draw[6] * (SIDE - height + 1)), int(draw[5] * (SIDE - width + 1))
    window = (slice(row, row + height), slice(column, column + width))
    opacity = np.zeros((SIDE, SIDE))
    opacity[window] = scaled[..., 3] / 255
    image[window] += opacity[window][..., None] * (scaled[..., :3] - image[window])
    metadata = {
        "object": cut_out.name,
        "background": background.name,
        "hue_bin": hue_bin(scene),
        "x": (column + width / 2) / SIDE,
        "y": (row + height / 2) / SIDE,
        "size": max(height, width) / SIDE,
    }
    return np.round(image).astype(np.uint8), opacity, metadata


def iter_samples(
    objects: dict[str, list[Picture]], backgrounds: list[Picture], part: str, seed: int
) -> Iterator[dict[str, str | bytes]]:
    """Yield the samples of a part, "train" or "val"; kinds are equally frequent."""
    of_kind = {kind: split(pictures, kind, part, seed) for kind, pictures in objects.items()}
    scenes = split(backgrounds, "backgrounds", part, seed)
    numbers = np.arange(NUM_IMAGES[part])
    # Every kind once in each group of so many images, in a random order.
    order = np.argsort(random_bits(seed, f"objects order {part}", numbers), kind="stable")
    for position, (number, draw) in enumerate(
        zip(order, uniforms(seed, f"objects {part}", 0, numbers, 9), strict=True)
    ):
        label = int(number) % len(KINDS)
        kind = list(KINDS)[label]
        cut_out = of_kind[kind][int(draw[0] * len(of_kind[kind]))]
        image, opacity, metadata = draw_image(cut_out, scenes[int(draw[1] * len(scenes))], draw[2:])
        mask = np.where(opacity >= 0.5, label + 1, 0).astype(np.uint8)
        files = {"jpg": _encode(image, "JPEG", quality=JPEG_QUALITY), "seg.png": _encode(mask, "PNG")}
        yield make_sample(f"{part}_{position:06d}", label, {"kind": kind, **metadata}, files)


def _encode(pixels: np.ndarray, format_name: str, **options: int) -> bytes:
    encoded = io.BytesIO()
    Image.fromarray(pixels).save(encoded, format_name, **options)
    return encoded.getvalue()


def draw_few(samples: list[dict[str, str | bytes]], count: int, number: int, seed: int) -> list[dict[str, str | bytes]]:
    """Return `count` samples of each kind. The draw of this number with a larger count contains them."""
    permutation = np.argsort(random_bits(seed, f"objects few {number}", np.arange(len(samples))), kind="stable")
    shuffled = [samples[index] for index in permutation]
    by_kind = [[sample for sample in shuffled if int(sample["cls"]) == label] for label in range(len(KINDS))]
    return [sample for kind in by_kind for sample in kind[:count]]


def write_objects(photographs: Path, destination: Path, seed: int = 0, *, for_pilot: bool = False) -> None:
    """Write the shards, or those of a pilot, which divides the training objects and backgrounds once more.

    So a pilot can choose settings without a look at the objects and backgrounds of validation.

    Raises:
        FileExistsError: if the destination is not empty.
        FileNotFoundError: if the packages are not unpacked in `photographs`.
    """
    objects, backgrounds = load_objects(photographs), load_backgrounds(photographs)
    if for_pilot:
        objects = {kind: split(pictures, kind, "train", seed) for kind, pictures in objects.items()}
        backgrounds = split(backgrounds, "backgrounds", "train", seed)
    with publish_folder(destination) as staging:
        for part in NUM_IMAGES:
            samples = list(iter_samples(objects, backgrounds, part, seed))
            write_shards(staging / part, samples, IMAGES_PER_SHARD)
            if part == "train":
                (staging / "few").mkdir()
                for count in FEW:
                    draws = [draw_few(samples, count, number, seed) for number in range(NUM_DRAWS)]
                    # One shard for each draw.
                    write_shards(staging / "few" / f"{count}-per-kind", chain(*draws), len(draws[0]))
        names = {"seed": seed, "kinds": list(KINDS), "objects": {}, "backgrounds": {}}
        for part in NUM_IMAGES:
            names["objects"][part] = {k: [p.name for p in split(o, k, part, seed)] for k, o in objects.items()}
            names["backgrounds"][part] = [p.name for p in split(backgrounds, "backgrounds", part, seed)]
        (staging / "objects.json").write_text(json.dumps(names, indent=1) + "\n")


def draw_sheet(photographs: Path, seed: int) -> Image.Image:
    """Return a picture of all cut-outs and backgrounds; those of validation have an orange frame."""
    rows = [*load_objects(photographs).items(), ("backgrounds", load_backgrounds(photographs))]
    columns, side = 24, 60
    num_rows = sum(-(-len(pictures) // columns) for _, pictures in rows)
    sheet, row = Image.new("RGB", (columns * side, num_rows * side), "white"), 0
    for name, pictures in rows:
        of_val = {picture.name for picture in split(pictures, name, "val", seed)}
        for index, picture in enumerate(pictures):
            image = Image.fromarray(picture.pixels).convert("RGBA")
            image.thumbnail((side - 8, side - 8), Image.Resampling.LANCZOS)
            x, y = index % columns * side, (row + index // columns) * side
            sheet.paste(
                "darkorange" if picture.name in of_val else "lightgrey", (x + 1, y + 1, x + side - 1, y + side - 1)
            )
            sheet.paste("white", (x + 3, y + 3, x + side - 3, y + side - 3))
            sheet.paste(image, (x + (side - image.width) // 2, y + (side - image.height) // 2), image)
        row += -(-len(pictures) // columns)
    return sheet


def main() -> None:
    """Write the shards, or a sheet of what they are made of."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", type=Path, help="folder that debian_photographs.sh has written")
    parser.add_argument("destination", type=Path, help="folder of the shards, which must not exist or be empty")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pilot", action="store_true", help="divide the training objects and backgrounds once more")
    parser.add_argument(
        "--sheet", type=Path, help="write a picture of all cut-outs and backgrounds to this file instead"
    )
    arguments = parser.parse_args()
    try:
        if arguments.sheet:
            draw_sheet(arguments.photographs, arguments.seed).save(arguments.sheet)
        else:
            write_objects(arguments.photographs, arguments.destination, arguments.seed, for_pilot=arguments.pilot)
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
