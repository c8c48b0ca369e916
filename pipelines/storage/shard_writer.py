"""Pack an image folder, with or without one subfolder per class, into WebDataset shards for training and validation.

The shards are written into a temporary folder that is renamed at the end, so that the destination is either complete or
absent. The same images and seed give the same bytes every time.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from webdataset.writer import ShardWriter

from iwm_fast.pipelines.config import IMAGE_EXTENSIONS, PACK_DEFAULTS, PackConfig
from iwm_fast.pipelines.counter_rng import random_bits

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PackedSet:
    """A set of shards that `pack_folder` has written."""

    folder: Path
    shards: tuple[Path, ...]
    num_images: int
    num_classes: int
    """Number of classes that have images in this set, 0 if the images have no labels."""

    def __str__(self) -> str:
        return f"{self.folder}: images {self.num_images:,}, classes {self.num_classes:,}, shards {len(self.shards):,}"


class _Image(NamedTuple):
    label: int
    path: Path


def pack_folder(source: Path, destination: Path, config: PackConfig = PACK_DEFAULTS, seed: int = 0) -> list[PackedSet]:
    """Pack an image folder into shards; the bytes of the image files do not change.

    With one subfolder per class, labels are 0 .. K-1 in the order of the subfolders' names, which are written to
    `classes.json`. Images in the folder itself get no label. `.json` members hold file name and class. Images are
    written in a fixed random order, because shuffling in training mixes only a few shards at a time.

    With `config.val_share`, or if the source consists of the folders `train` and `val`, training and validation shards
    are written to the folders `train` and `val` of the destination. Both have the class numbers of training.

    Returns:
        The set in `destination`, or the training and the validation set.

    Raises:
        FileNotFoundError: if the source does not exist or holds no images, or `config.classes` does not exist.
        FileExistsError: if the destination is not empty.
        ValueError: if only some of the images lie in class folders, an image file is empty, a class is not listed in
            `config.classes` or has only validation images, or `config.val_share` does not fit the source.
    """
    classes, sets = _find_images(source, config, seed)
    with publish_folder(destination) as staging:
        for name, images in sets.items():
            folder = staging / name
            folder.mkdir(exist_ok=True)
            write_shards(folder / "shard", _samples(source, images, classes, seed), config.samples_per_shard)
            if classes:
                (folder / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
    return [
        PackedSet(
            folder=destination / name,
            shards=tuple(sorted((destination / name).glob("shard-*.tar"))),
            num_images=len(images),
            num_classes=len({image.label for image in images}) if classes else 0,
        )
        for name, images in sets.items()
    ]


def _find_images(source: Path, config: PackConfig, seed: int) -> tuple[list[str], dict[str, list[_Image]]]:
    """Return the class names and the images of each set by the folder that it is written to, "" for the destination."""
    folders = _class_names(source, "")
    if {"train", "val"} <= set(folders):
        return _find_both_sets(source, folders, config)
    classes = _class_names(source, config.classes)
    images = _labelled_images(source, classes)
    if not config.val_share:
        return classes, {"": images}
    train, val = _split(images, config.val_share, seed)
    if not val:
        problem = f"val_share must be unset for {source}, which has no class with two images"
        raise ValueError(f"{problem}, got {config.val_share:g}")
    return classes, {"train": train, "val": val}


def _find_both_sets(source: Path, folders: list[str], config: PackConfig) -> tuple[list[str], dict[str, list[_Image]]]:
    """Return the class names of `train`, and the images of `train` and `val`."""
    others = [name for name in folders if name not in ("train", "val")]
    if others:
        remedy = "move these elsewhere, or pack each folder on its own with classes="
        raise ValueError(f"{source} holds the folders train and val, but also {', '.join(others)}; {remedy}")
    if config.val_share:
        problem = f"val_share must be unset for {source}, which has validation images in {source / 'val'}"
        raise ValueError(f"{problem}, got {config.val_share:g}; to draw others, pack {source / 'train'}")
    classes, val_classes = _class_names(source / "train", config.classes), _class_names(source / "val", "")
    if bool(classes) != bool(val_classes):
        having, lacking = ("train", "val") if classes else ("val", "train")
        problem = f"{source / having} has class folders, but {source / lacking} has none"
        raise ValueError(f"{problem}; sort the images of both into class folders, or of neither")
    train = _labelled_images(source / "train", classes)
    trained = {classes[image.label] for image in train} if classes else set()
    unknown = [name for name in val_classes if name not in trained]
    if unknown:
        problem = f"{source / 'train'} has no images of {len(unknown)} classes of {source / 'val'}: {unknown}"
        raise ValueError(f"{problem}; add training images or remove these class folders")
    return classes, {"train": train, "val": _labelled_images(source / "val", classes)}


def _labelled_images(folder: Path, classes: list[str]) -> list[_Image]:
    """Return the images of a folder sorted by class and path, all with the label 0 if there are no classes."""
    # A validation folder may lack some of the training classes.
    present = [(label, name) for label, name in enumerate(classes or [""]) if (folder / name).is_dir()]
    images = [_Image(label, path) for label, name in present for path in _images(folder / name)]
    if not images:
        accepted = ", ".join(IMAGE_EXTENSIONS)
        raise FileNotFoundError(f"{folder} holds no images: accepted extensions are {accepted}")
    return images


def _split(images: list[_Image], val_share: float, seed: int) -> tuple[list[_Image], list[_Image]]:
    """Divide images, which are sorted by class, into training and validation images, each class by the same share."""
    train, val = [], []
    for label, group in groupby(images, key=lambda image: image.label):
        members = list(group)
        # Both sets get an image of each class. A single image goes to train, since classes are learned from there.
        num_val = min(max(round(val_share * len(members)), 1), len(members) - 1)
        order = np.argsort(random_bits(seed, "validation share", label, np.arange(len(members))), kind="stable")
        val += [members[index] for index in sorted(order[:num_val])]
        train += [members[index] for index in sorted(order[num_val:])]
    return train, val


def _samples(source: Path, images: list[_Image], classes: list[str], seed: int) -> Iterator[dict[str, str | bytes]]:
    """Yield the samples of a set in the order in which they are written."""
    # Sorting random keys gives a permutation that depends only on the seed and the number of images.
    order = np.argsort(random_bits(seed, "pack order", np.arange(len(images))), kind="stable")
    for number, (label, path) in enumerate(images[index] for index in order):
        content = path.read_bytes()
        if not content:
            raise ValueError(f"image file {path} is empty; replace or remove it")
        metadata = {"file": path.relative_to(source).as_posix()} | ({"class": classes[label]} if classes else {})
        key = f"{number:08d}_{_sanitize(path.stem)}"
        yield make_sample(key, label if classes else None, metadata, {path.suffix[1:].lower(): content})


def _class_names(source: Path, classes_path: str) -> list[str]:
    """Return the classes in the order of their numbers, none if the images lie in the folder itself."""
    if not source.is_dir():
        raise FileNotFoundError(f"image folder {source} does not exist or is not a folder")
    entries = sorted(entry for entry in source.iterdir() if not entry.name.startswith("."))
    loose_images = [entry.name for entry in entries if entry.is_file() and _is_image(entry.name)]
    names = [entry.name for entry in entries if entry.is_dir()]
    if loose_images and (names or classes_path):
        problem = f"{len(loose_images)} images lie in {source} itself, the first is {loose_images[0]}"
        raise ValueError(f"{problem}; either all images must lie in class folders, {source}/CLASS/IMAGE, or none")
    if not classes_path:
        return names
    classes = json.loads(Path(classes_path).read_text())
    unlisted = [name for name in names if name not in classes]
    if unlisted:
        raise ValueError(
            f"class folders of {source} must be listed in classes={classes_path}, which lists {len(classes)} classes, "
            f"got {unlisted}"
        )
    return classes


def _images(folder: Path) -> list[Path]:
    """Return the images in a folder and its subfolders, following links, sorted by path."""
    paths = []
    # Links are followed, because a subset of a data set is often a folder of links.
    for parent, _, names in os.walk(folder, followlinks=True):
        visible = [name for name in names if not name.startswith(".")]
        images = [Path(parent, name) for name in visible if _is_image(name)]
        paths += images
        if len(images) < len(visible):
            log.warning("%s: %d files that are not images are left out", parent, len(visible) - len(images))
    if not paths:
        log.warning("folder %s holds no images", folder)
    return sorted(paths)


def _is_image(name: str) -> bool:
    return Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS


def _sanitize(stem: str) -> str:
    # A dot would end the key, and names of more than 100 bytes would need extended tar headers.
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:48]


def make_sample(key: str, label: int | None, metadata: dict, images: dict[str, bytes]) -> dict[str, str | bytes]:
    """Return a sample for `write_shards`: `.cls` if there is a label, `.json`, and the images by extension."""
    members = {} if label is None else {"cls": str(label).encode()}
    return {"__key__": key, **members, "json": json.dumps(metadata, sort_keys=True).encode(), **images}


def write_shards(prefix: Path, samples: Iterable[dict[str, str | bytes]], samples_per_shard: int) -> None:
    """Write samples to PREFIX-000000.tar, PREFIX-000001.tar, ...; equal samples give equal bytes."""
    # ShardWriter inserts the number with the % operator, so that a % in the path must be doubled.
    pattern = str(prefix.absolute()).replace("%", "%%") + "-%06d.tar"
    # Without mtime=0, each member would carry the time of writing. verbose=0 stops it from printing to stdout.
    with ShardWriter(pattern, maxcount=samples_per_shard, verbose=0, mtime=0, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)


@contextmanager
def publish_folder(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `destination` if the `with` block succeeds and is removed if it fails.

    Raises:
        FileExistsError: if the destination is not empty.
    """
    destination = destination.resolve()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        num_shards = sum(len(list(destination.glob(pattern))) for pattern in ("*.tar", "*/*.tar"))
        problem = f"{destination} is not empty (it holds {num_shards} shards)"
        raise FileExistsError(f"{problem}; nothing is overwritten: remove it or choose another folder")
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Next to the destination, because a rename cannot cross file systems.
    with TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as temporary:
        staging = Path(temporary, "shards")
        staging.mkdir()
        yield staging
        staging.rename(destination)
