"""Make WebDataset shards: from an image folder with class subfolders, or from photographs that are already installed.

Both write into a temporary folder that is renamed at the end, so that a destination is either whole or absent, and both
write the same bytes every time.
"""

import importlib.util
import io
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from webdataset.writer import ShardWriter

from pipelines.config import IMAGE_EXTENSIONS, PACK_DEFAULTS, PackConfig, check
from pipelines.draws import random_bits, uniforms

LOG = logging.getLogger(__name__)

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


def pack_folder(source: Path, destination: Path, config: PackConfig = PACK_DEFAULTS, seed: int = 0) -> list[Path]:
    """Pack an image folder into shards; the image files' bytes stay as they are.

    With one subfolder per class, labels are 0 .. K-1 in the order of the subfolders' names, written to `classes.json`;
    images that lie in the folder itself get none. `.json` members hold class and file name. Images are written in a
    fixed random order, because shuffling in training mixes only a few shards.

    Raises:
        FileNotFoundError: if the source, or images in it, or the list of classes are missing.
        FileExistsError: if the destination already holds something.
        ValueError: if some images have classes and others none, one is empty, or a class is not in the list.
    """
    classes = _class_names(source, config.classes)
    folders = classes or [""]
    present = [name for name in folders if (source / name).is_dir()]
    files = [(folders.index(name), path) for name in present for path in _images(source / name)]
    if not files:
        accepted = ", ".join(IMAGE_EXTENSIONS)
        raise FileNotFoundError(f"{source} holds no images: accepted extensions are {accepted}")
    order = np.argsort(random_bits(seed, "pack order", np.arange(len(files))), kind="stable")

    def samples() -> Iterator[dict[str, str | bytes]]:
        for number, (label, path) in enumerate(files[index] for index in order):
            content = path.read_bytes()
            check(len(content) > 0, f"size of {path}", 0, "be at least 1 byte: replace or remove the file")
            note = {"file": path.relative_to(source).as_posix()} | ({"class": classes[label]} if classes else {})
            extension = path.suffix[1:].lower()
            key = f"{number:08d}_{_sanitize(path.stem)}"
            yield _sample(key, label if classes else None, note, {extension: content})

    with _publish(destination) as staging:
        _write_shards(staging / "shard", samples(), config.samples_per_shard)
        if classes:
            (staging / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
    return sorted(destination.glob("shard-*.tar"))


def _class_names(source: Path, given: str) -> list[str]:
    """Return the classes in the order of their numbers, none if the images lie in the folder itself."""
    if not source.is_dir():
        raise FileNotFoundError(f"image folder {source} does not exist or is no folder")
    entries = sorted(entry for entry in source.iterdir() if not entry.name.startswith("."))
    loose = [entry.name for entry in entries if entry.is_file() and _is_image(entry.name)]
    names = [entry.name for entry in entries if entry.is_dir()]
    if loose and (names or given):
        what = f"{len(loose)} images lie in {source} itself, the first is {loose[0]}"
        raise ValueError(f"{what}; either each lies in a class folder, {source}/CLASS/IMAGE, or none")
    if not given:
        return names
    known = json.loads(Path(given).read_text())
    unknown = [name for name in names if name not in known]
    check(not unknown, f"class folders of {source}", unknown, f"be named in classes={given}, which lists {len(known)}")
    return known


def _images(folder: Path) -> list[Path]:
    """List the images of a folder, also in its subfolders, also behind links, by name."""
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        visible = [name for name in names if not name.startswith(".")]
        images = [Path(parent, name) for name in visible if _is_image(name)]
        found += images
        if len(images) < len(visible):
            LOG.warning("%s: %d files that are no images left out", parent, len(visible) - len(images))
    if not found:
        LOG.warning("folder %s holds no images", folder)
    return sorted(found)


def _is_image(name: str) -> bool:
    return Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS


def _sanitize(stem: str) -> str:
    # a dot would end the key; tar names beyond 100 bytes would need extended headers
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:48]


def _sample(key: str, label: int | None, note: dict, image: dict[str, bytes]) -> dict[str, str | bytes]:
    members = {} if label is None else {"cls": str(label).encode()}
    return {"__key__": key, **members, "json": json.dumps(note, sort_keys=True).encode(), **image}


def _write_shards(prefix: Path, samples: Iterable[dict[str, str | bytes]], samples_per_shard: int) -> None:
    # ShardWriter fills the number in with the % operator; it prints to stdout unless told not to
    pattern = str(prefix.absolute()).replace("%", "%%") + "-%06d.tar"
    # mtime: without it every member carries the time of writing
    with ShardWriter(pattern, maxcount=samples_per_shard, verbose=0, mtime=0, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)


@contextmanager
def _publish(destination: Path) -> Iterator[Path]:
    """Lend a temporary folder that becomes `destination` if the block succeeds, and vanishes if it does not."""
    destination = destination.resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        held = len(list(destination.glob("*.tar")))
        what = f"{destination} is not empty (it holds {held} shards)"
        raise FileExistsError(f"{what}; nothing is overwritten: remove it or write elsewhere")
    destination.parent.mkdir(parents=True, exist_ok=True)
    # beside the destination, because a rename cannot leave its file system
    with TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as temporary:
        staging = Path(temporary, "shards")
        staging.mkdir()
        yield staging
        staging.rename(destination)


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
    `.json` members hold photograph, hue_bin (see `hue_bin`), size (side of the crop in pixels), x and y (centre of the
    crop as a share of its region's width and height).

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
    with _publish(destination) as staging:
        photographs = [load_photograph(path) for path in DEMO_PHOTOGRAPHS]
        for split, num_shards in DEMO_SHARDS.items():
            samples = _demo_samples(photographs, names, split, seed)
            _write_shards(staging / split, samples, num_samples[split] // num_shards)
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


def hue_bin(crop: UInt8[np.ndarray, "H W 3"]) -> int:
    """Return 0 for a crop without clear colour, else 1 .. 7: the seventh of the hue circle its mean chroma points to.

    Chroma is the (I, Q) pair of YIQ, the plane in which the hue transform turns; angles count from +I (orange), so
    that the many warm photographs fall on both sides of a border instead of into one bin.
    """
    red, green, blue = crop.reshape(-1, 3).mean(axis=0)
    in_phase = 0.596 * red - 0.274 * green - 0.321 * blue
    quadrature = 0.211 * red - 0.523 * green + 0.311 * blue
    if np.hypot(in_phase, quadrature) < GREY_CHROMA:
        return 0
    return 1 + int(np.arctan2(quadrature, in_phase) % (2 * np.pi) / (2 * np.pi) * 7)


def _demo_samples(photographs: list[np.ndarray], names: tuple[str, ...], split: str, seed: int) -> Iterator[dict]:
    count = DEMO_CROPS[split]
    numbers = np.arange(count * len(names))
    draws = uniforms(seed, f"demo {split}", 0, numbers, 3)
    order = np.argsort(random_bits(seed, f"demo order {split}", numbers), kind="stable")
    for place, number in enumerate(order):
        label = int(number) // count
        photograph = photographs[label]
        columns = split_columns(photograph.shape[1], split)
        region = photograph[:, columns.start : columns.stop]
        crop, where = _crop(region, draws[number])
        encoded = io.BytesIO()
        Image.fromarray(crop).save(encoded, "JPEG", quality=DEMO_JPEG_QUALITY)
        note = {"photograph": names[label], "hue_bin": hue_bin(crop), **where}
        yield _sample(f"{split}_{place:06d}", label, note, {"jpg": encoded.getvalue()})


def _crop(region: np.ndarray, draw: np.ndarray) -> tuple[np.ndarray, dict[str, int | float]]:
    """Cut a square out of a region; three uniform numbers decide its area and place."""
    smallest, largest = DEMO_CROP_SIDE
    side = round(float(np.sqrt(smallest**2 + draw[0] * (largest**2 - smallest**2))))
    height, width = region.shape[:2]
    top, left = int(draw[1] * (height - side + 1)), int(draw[2] * (width - side + 1))
    where = {"size": side, "x": (left + side / 2) / width, "y": (top + side / 2) / height}
    return region[top : top + side, left : left + side], where
