"""Pack an image folder, with or without one subfolder per class, into WebDataset shards.

The shards are written into a temporary folder that is renamed at the end, so that the destination is either complete or
absent. The same images and seed give the same bytes every time.
"""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from webdataset.writer import ShardWriter

from iwm_fast.pipelines.config import IMAGE_EXTENSIONS, PACK_DEFAULTS, PackConfig
from iwm_fast.pipelines.counter_rng import random_bits

log = logging.getLogger(__name__)


def pack_folder(source: Path, destination: Path, config: PackConfig = PACK_DEFAULTS, seed: int = 0) -> list[Path]:
    """Pack an image folder into shards and return their paths; the bytes of the image files do not change.

    With one subfolder per class, labels are 0 .. K-1 in the order of the subfolders' names, which are written to
    `classes.json`. Images in the folder itself get no label. `.json` members hold file name and class. Images are
    written in a fixed random order, because shuffling in training mixes only a few shards at a time.

    Raises:
        FileNotFoundError: if the source does not exist or holds no images, or `config.classes` does not exist.
        FileExistsError: if the destination is not empty.
        ValueError: if only some of the images lie in class folders, an image file is empty, or a class is not listed in
            `config.classes`.
    """
    classes = _class_names(source, config.classes)
    folders = classes or [""]
    # A validation folder may lack some of the training classes.
    present = [name for name in folders if (source / name).is_dir()]
    files = [(folders.index(name), path) for name in present for path in _images(source / name)]
    if not files:
        accepted = ", ".join(IMAGE_EXTENSIONS)
        raise FileNotFoundError(f"{source} holds no images: accepted extensions are {accepted}")
    # Sorting random keys gives a permutation that depends only on the seed and the number of files.
    order = np.argsort(random_bits(seed, "pack order", np.arange(len(files))), kind="stable")

    def samples() -> Iterator[dict[str, str | bytes]]:
        for number, (label, path) in enumerate(files[index] for index in order):
            content = path.read_bytes()
            if not content:
                raise ValueError(f"image file {path} is empty; replace or remove it")
            metadata = {"file": path.relative_to(source).as_posix()} | ({"class": classes[label]} if classes else {})
            extension = path.suffix[1:].lower()
            key = f"{number:08d}_{_sanitize(path.stem)}"
            yield make_sample(key, label if classes else None, metadata, {extension: content})

    with publish_folder(destination) as staging:
        write_shards(staging / "shard", samples(), config.samples_per_shard)
        if classes:
            (staging / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
    return sorted(destination.glob("shard-*.tar"))


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
        num_shards = len(list(destination.glob("*.tar")))
        problem = f"{destination} is not empty (it holds {num_shards} shards)"
        raise FileExistsError(f"{problem}; nothing is overwritten: remove it or choose another folder")
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Next to the destination, because a rename cannot cross file systems.
    with TemporaryDirectory(dir=destination.parent, prefix=f".{destination.name}-") as temporary:
        staging = Path(temporary, "shards")
        staging.mkdir()
        yield staging
        staging.rename(destination)
