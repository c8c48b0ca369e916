"""Pack an image folder, with or without one subfolder per class, into WebDataset shards for training and validation.

The shards are written into a temporary folder that is renamed at the end, so that the destination is either complete or
absent. The same images and seed give the same bytes every time.
"""

import json
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from webdataset.writer import ShardWriter

from iwm_fast.pipelines.config import IMAGE_EXTENSIONS, PACK_DEFAULTS, PackConfig
from iwm_fast.pipelines.counter_rng import random_bits
from iwm_fast.pipelines.errors import UndecodableImageError, printable, to_valid_unicode
from iwm_fast.pipelines.image_header import probe
from iwm_fast.pipelines.storage.atomic import force_to_disk, lock_folder
from iwm_fast.pipelines.storage.image_folder import (
    ImageFolders,
    folder_classes,
    known_classes,
    read_image_table,
    refuse_file,
)
from iwm_fast.pipelines.storage.shard import index_shard
from iwm_fast.pipelines.transforms.smaller_images import shrink_if_larger
from iwm_fast.pipelines.worker_processes import worker_pool

log = logging.getLogger(__name__)

_MAX_LISTED = 20
# A process needs about two seconds to start.
_MIN_PATHS_PER_PROCESS = 100


@dataclass(frozen=True, kw_only=True)
class PackedSet:
    """A set of shards that `pack_folder` has written."""

    folder: Path
    shards: tuple[Path, ...]
    num_images: int
    num_classes: int
    """Number of classes that have images in this set, 0 if the images have no labels."""

    def __str__(self) -> str:
        counts = f"images {self.num_images:,}, classes {self.num_classes:,}, shards {len(self.shards):,}"
        return f"{printable(str(self.folder))}: {counts}"


class _Image(NamedTuple):
    label: int
    path: Path
    fields: Mapping[str, str] = MappingProxyType({})
    """Further fields of its `.json` member."""


def pack_folder(source: Path, destination: Path, config: PackConfig = PACK_DEFAULTS, seed: int = 0) -> list[PackedSet]:
    """Pack an image folder into shards; the bytes of the image files change only if `config.shorter` is set.

    With one subfolder per class, labels are 0 .. K-1 in the order of the subfolders' names, which are written to
    `classes.json`. Images in the folder itself get no label. `.json` members hold file name and class. Images are
    written in a fixed random order, because shuffling in training mixes only a few shards at a time.

    With `config.labels`, a table lists the images, their classes and further fields instead. With `config.maps`, each
    image has a segmentation map.

    Each real file is packed once, however many links lead to it. Hidden files and folders are left out. Files that
    cannot be packed are listed before anything is written.

    With `config.val_share`, or if the source consists of the folders `train` and `val`, training and validation shards
    are written to the folders `train` and `val` of the destination. Both have the class numbers of training.

    Returns:
        The set in `destination`, or the training and the validation set.

    Raises:
        FileNotFoundError: if the source does not exist or holds no images, or `config.classes` does not exist.
        FileExistsError: if the destination is not empty, or another process is packing into it.
        ValueError: if files cannot be packed, only some of the images lie in class folders, a class is not listed in
            `config.classes` or has only validation images, `config.val_share` does not fit the source, or the
            destination lies in the source.
    """
    _check_destination(source, destination)
    classes, sets = _find_images(source, config, seed)
    with publish_folder(destination) as staging:
        for name, images in sets.items():
            folder = staging / name
            folder.mkdir(exist_ok=True)
            samples = _samples(source, _in_pack_order(images, seed), classes, config)
            write_shards(folder / "shard", samples, config.samples_per_shard)
            if classes:
                (folder / "classes.json").write_text(json.dumps(classes, indent=1) + "\n")
    return [_describe(destination / name) for name in sets]


def _describe(folder: Path) -> PackedSet:
    """Return what was packed into a folder."""
    paths = tuple(sorted(folder.glob("shard-*.tar")))
    labels = np.concatenate([index_shard(str(path)).label for path in paths])
    num_classes = len(np.unique(labels[labels >= 0]))
    return PackedSet(folder=folder, shards=paths, num_images=len(labels), num_classes=num_classes)


def _check_destination(source: Path, destination: Path) -> None:
    if destination.resolve().is_relative_to(source.resolve()):
        problem = f"the folder to write to must lie outside of the image folder {source}, got {destination}"
        raise ValueError(f"{problem}; otherwise it would be one of the classes next time")
    if "::" in str(destination):
        raise ValueError(f"the folder to write to must not contain '::', which separates shards, got {destination}")


def _find_images(source: Path, config: PackConfig, seed: int) -> tuple[list[str], dict[str, list[_Image]]]:
    """Return the class names and the images of each set by the folder that it is written to, "" for the destination."""
    if config.labels:
        classes, images = _listed_images(source, config)
    else:
        folders = folder_classes(source, "")
        if {"train", "val"} <= set(folders):
            return _find_both_sets(source, folders, config)
        classes = folder_classes(source, config.classes)
        (images,) = _labelled_images({source: classes}, source, config)
    if not config.val_share:
        return classes, {"": images}
    train, val = _split(images, config.val_share, seed)
    if not val:
        problem = f"val_share must be unset for {source}, which has no class with two images"
        raise ValueError(f"{problem}, got {config.val_share:g}")
    return classes, {"train": train, "val": val}


def _listed_images(source: Path, config: PackConfig) -> tuple[list[str], list[_Image]]:
    """Return the class names and the images of the table `config.labels`, sorted by class and path."""
    rows = read_image_table(Path(config.labels))
    names = sorted({row["class"] for row in rows.values() if "class" in row})
    classes = known_classes(names, config.classes, config.labels) if config.classes else names
    number = {name: label for label, name in enumerate(classes)}
    images, problems = [], []
    for file, row in rows.items():
        path = source / file
        refusal = refuse_file(path, config.max_pixels, _map_path(path, source, config))
        problems += [printable(f"{path} {refusal}")] if refusal else []
        images += [] if refusal else [_Image(number.get(row.pop("class", ""), 0), path, row)]
    _report_problems(problems, config)
    if not images:
        raise FileNotFoundError(f"labels={config.labels} lists no image that can be packed")
    return classes, sorted(images, key=lambda image: (image.label, image.path))


def _find_both_sets(source: Path, folders: list[str], config: PackConfig) -> tuple[list[str], dict[str, list[_Image]]]:
    """Return the class names of `train`, and the images of `train` and `val`."""
    others = [name for name in folders if name not in ("train", "val")]
    if others:
        remedy = "move these elsewhere, or pack each folder on its own with classes="
        raise ValueError(f"{source} holds the folders train and val, but also {', '.join(others)}; {remedy}")
    if config.val_share:
        problem = f"val_share must be unset for {source}, which has validation images in {source / 'val'}"
        raise ValueError(f"{problem}, got {config.val_share:g}; to draw others, pack {source / 'train'}")
    classes, val_classes = folder_classes(source / "train", config.classes), folder_classes(source / "val", "")
    if bool(classes) != bool(val_classes):
        having, lacking = ("train", "val") if classes else ("val", "train")
        problem = f"{source / having} has class folders, but {source / lacking} has none"
        raise ValueError(f"{problem}; sort the images of both into class folders, or of neither")
    train, val = _labelled_images({source / "train": classes, source / "val": classes}, source, config)
    trained = {classes[image.label] for image in train} if classes else set()
    unknown = [name for name in val_classes if name not in trained]
    if unknown:
        problem = f"{source / 'train'} has no images of {len(unknown)} classes of {source / 'val'}: {unknown}"
        raise ValueError(f"{problem}; add training images or remove these class folders")
    return classes, {"train": train, "val": val}


def _labelled_images(class_names: dict[Path, list[str]], root: Path, config: PackConfig) -> list[list[_Image]]:
    """Return the images of each folder sorted by class and path, all with the label 0 if it has no class names.

    `root` is the image folder that is packed, to which the paths of segmentation maps are relative.
    """
    # A validation folder may lack some of the training classes.
    folders = {
        (source, label): source / name
        for source, classes in class_names.items()
        for label, name in enumerate(classes or [""])
        if os.path.lexists(source / name)
    }
    found = ImageFolders(folders)
    images, problems = {}, list(found.problems)
    for group, paths in found.images.items():
        refusals = {path: refuse_file(path, config.max_pixels, _map_path(path, root, config)) for path in paths}
        images[group] = [path for path, refusal in refusals.items() if not refusal]
        problems += [printable(f"{path} {refusal}") for path, refusal in refusals.items() if refusal]
    _report_problems(problems, config)
    if found.num_other:
        first = printable(str(found.first_other))
        log.warning("%d files without the extension of an image are left out, the first is %s", found.num_other, first)
    if found.num_repeated:
        log.warning("%d links to files or folders that are packed already are left out", found.num_repeated)
    _warn_of_odd_classes(folders, images)
    for source in class_names:
        if not any(paths for (folder, _), paths in images.items() if folder == source):
            accepted = ", ".join(IMAGE_EXTENSIONS)
            raise FileNotFoundError(f"{source} holds no images: accepted extensions are {accepted}")
    return [
        [_Image(label, path) for (folder, label), paths in images.items() for path in paths if folder == source]
        for source in class_names
    ]


def _map_path(path: Path, source: Path, config: PackConfig) -> Path | None:
    """Return the path of an image's segmentation map, None if no maps are packed."""
    return Path(config.maps, path.relative_to(source)).with_suffix(".png") if config.maps else None


def _report_problems(problems: list[str], config: PackConfig) -> None:
    """Raise ValueError if some files cannot be packed, or log a warning if they are left out."""
    if not problems:
        return
    more = [f"... and {len(problems) - _MAX_LISTED} more"] if len(problems) > _MAX_LISTED else []
    listed = "\n  ".join(["", *problems[:_MAX_LISTED], *more])
    if not config.leave_out_bad:
        remedy = "remove or replace them, or set leave_out_bad=true to pack the others"
        raise ValueError(f"{len(problems)} files or folders cannot be packed; {remedy}:{listed}")
    log.warning("%d files or folders are left out:%s", len(problems), listed)


def _warn_of_odd_classes(folders: dict[tuple[Path, int], Path], images: dict[tuple[Path, int], list[Path]]) -> None:
    """Warn of class folders without images, and of those that hold only folders, which may be the classes."""
    without = [folder for group, folder in folders.items() if not images[group]]
    if without:
        log.warning("%d folders hold no images, the first is %s", len(without), printable(str(without[0])))
    # The source itself, whose images have no classes, may hold only folders.
    nested = [
        (folder, sorted({path.relative_to(folder).parts[0] for path in images[group]}))
        for group, folder in folders.items()
        if folder != group[0] and images[group] and all(path.parent != folder for path in images[group])
    ]
    if nested:
        first, subfolders = nested[0]
        listed = printable(f"{first} ({', '.join(subfolders[:5])})")
        text = "%d class folders hold only folders, the first is %s; if these are the classes, pack %s on its own"
        log.warning(text, len(nested), listed, printable(str(first)))


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


def _in_pack_order(images: list[_Image], seed: int) -> list[_Image]:
    # Sorting random keys gives a permutation that depends only on the seed and the number of images.
    order = np.argsort(random_bits(seed, "pack order", np.arange(len(images))), kind="stable")
    return [images[index] for index in order]


def _samples(
    source: Path, images: list[_Image], classes: list[str], config: PackConfig
) -> Iterator[dict[str, str | bytes]]:
    """Yield the samples of a set in the order in which they are written."""
    read, paths = partial(_read_image, source=source, config=config), [image.path for image in images]
    # Reading a file takes less time than handing its content to another process.
    contents = _map_in_processes(read, paths) if config.shorter else map(read, paths)
    for number, ((label, path, fields), content) in enumerate(zip(images, contents, strict=True)):
        if isinstance(content, UndecodableImageError):
            problem = printable(f"{path} {content}")
            if not config.leave_out_bad:
                raise ValueError(f"{problem}; remove or replace it, or set leave_out_bad=true to pack the others")
            log.warning("%s; it is left out", problem)
            continue
        metadata = {"file": path.relative_to(source).as_posix()} | ({"class": classes[label]} if classes else {})
        metadata |= fields
        metadata = {name: to_valid_unicode(text) for name, text in metadata.items()}
        key = f"{number:08d}_{_sanitize(path.stem)}"
        yield make_sample(key, label if classes else None, metadata, content)


def _read_image(path: Path, source: Path, config: PackConfig) -> dict[str, bytes] | UndecodableImageError:
    """Return a file's content, smaller if that is set, and its map, by extension; or why it is not an image."""
    content, extension = path.read_bytes(), path.suffix[1:].lower()
    map_path = _map_path(path, source, config)
    if map_path is not None:
        return {extension: content, "seg.png": map_path.read_bytes()}
    if config.shorter is None:
        return {extension: content}
    try:
        header = probe(content, config.max_pixels)
        smaller = shrink_if_larger(content, header, config.shorter, config.jpeg_quality)
    except UndecodableImageError as error:
        return error
    return {extension: content} if smaller is None else {"jpg": smaller}


def _map_in_processes(function: Callable[[Path], Any], paths: list[Path]) -> Iterator[Any]:
    """Yield the result of the function for each path, in order; there is one process per core."""
    num_processes = min(len(os.sched_getaffinity(0)), len(paths) // _MIN_PATHS_PER_PROCESS)
    if num_processes < 2:
        yield from map(function, paths)
        return
    pending: deque[Future[Any]] = deque()
    with worker_pool(num_processes) as pool:
        for path in paths:
            pending.append(pool.submit(function, path))
            # Enough that no process waits for a slow image of another one.
            if len(pending) > 16 * num_processes:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


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
    # Next to the destination, because a rename cannot cross file systems. Hidden, so that no pattern finds its shards.
    with _draft_folder(destination.with_name(f".{destination.name}.unfinished")) as draft:
        staging = draft / "shards"
        staging.mkdir()
        try:
            yield staging
            # A rename is not ordered after earlier writes: after a power failure, the folder could hold empty files.
            for path in (*staging.rglob("*"), staging):
                force_to_disk(path)
            staging.rename(destination)
        except OSError as error:
            error.add_note(f"nothing was written to {destination}; free space or choose another folder, and pack again")
            raise
        force_to_disk(destination.parent)


@contextmanager
def _draft_folder(path: Path) -> Iterator[Path]:
    """Create an empty folder for this process alone, and remove it at the end.

    Raises:
        FileExistsError: if another process is using it.
    """
    path.mkdir(exist_ok=True)
    with lock_folder(path):
        try:
            # What a process that was killed has left.
            for leftover in path.iterdir():
                shutil.rmtree(leftover)
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
