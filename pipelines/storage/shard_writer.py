"""Make WebDataset shards from an image folder, with one subfolder per class or without.

They are written into a temporary folder that is renamed at the end, so that a destination is either whole or absent;
the bytes are the same every time.
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

from iwm_fast.pipelines.config import IMAGE_EXTENSIONS, PACK_DEFAULTS, PackConfig, check
from iwm_fast.pipelines.counter_rng import random_bits

log = logging.getLogger(__name__)


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
            yield shard_sample(key, label if classes else None, note, {extension: content})

    with publish_folder(destination) as staging:
        write_shards(staging / "shard", samples(), config.samples_per_shard)
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
            log.warning("%s: %d files that are no images left out", parent, len(visible) - len(images))
    if not found:
        log.warning("folder %s holds no images", folder)
    return sorted(found)


def _is_image(name: str) -> bool:
    return Path(name).suffix[1:].lower() in IMAGE_EXTENSIONS


def _sanitize(stem: str) -> str:
    # a dot would end the key; tar names beyond 100 bytes would need extended headers
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem)[:48]


def shard_sample(key: str, label: int | None, note: dict, images: dict[str, bytes]) -> dict[str, str | bytes]:
    """Return a sample as the writer takes it: `.cls` if there is a label, `.json`, and images by extension."""
    members = {} if label is None else {"cls": str(label).encode()}
    return {"__key__": key, **members, "json": json.dumps(note, sort_keys=True).encode(), **images}


def write_shards(prefix: Path, samples: Iterable[dict[str, str | bytes]], samples_per_shard: int) -> None:
    """Write samples to PREFIX-000000.tar and so on, with the same bytes every time."""
    # ShardWriter fills the number in with the % operator; it prints to stdout unless told not to
    pattern = str(prefix.absolute()).replace("%", "%%") + "-%06d.tar"
    # mtime: without it every member carries the time of writing
    with ShardWriter(pattern, maxcount=samples_per_shard, verbose=0, mtime=0, encoder=False) as writer:
        for sample in samples:
            writer.write(sample)


@contextmanager
def publish_folder(destination: Path) -> Iterator[Path]:
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
