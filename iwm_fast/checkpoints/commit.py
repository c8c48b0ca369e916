"""Publish a folder whole or not at all, and recognise one that was damaged later.

The files are written into a temporary folder beside the final one and forced to disk, then a manifest with the size and
SHA-256 of each, then the folder is renamed: whoever looks sees all of it or nothing.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from itertools import chain, count
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"

_TEMPORARY = ".unfinished-"


class CheckpointError(Exception):
    """A checkpoint cannot be written, read or used; says where and what to do."""


def publish(folder: Path, writers: dict[str, Callable[[Path], None]]) -> None:
    """Make a folder of the files that the writers write, by file name.

    Raises:
        CheckpointError: if the folder exists.
        OSError: if the disk is full or does not let us.
    """
    if folder.exists():
        raise CheckpointError(f"{folder} exists already; move it away or choose another folder")
    draft = folder.parent / f"{_TEMPORARY}{folder.name}"
    shutil.rmtree(draft, ignore_errors=True)
    is_first = not folder.parent.exists()
    draft.mkdir(parents=True)
    try:
        for name, write_file in writers.items():
            write_file(draft / name)
            _force_to_disk(draft / name)
        save_json({name: _describe(draft / name) for name in writers}, draft / MANIFEST)
        for name in writers:
            # safetensors makes files that nobody else may read
            (draft / name).chmod((draft / MANIFEST).stat().st_mode)
        _force_to_disk(draft / MANIFEST)
        _force_to_disk(draft)
        draft.rename(folder)
    except BaseException:
        # on a full disk this gives the room back
        shutil.rmtree(draft, ignore_errors=True)
        raise
    _force_to_disk(folder.parent)
    if is_first:
        _force_to_disk(folder.parent.parent)


def remove(folder: Path) -> None:
    """Remove a published folder so that half of it is never seen."""
    shutil.rmtree(folder.rename(folder.parent / f"{_TEMPORARY}removing-{folder.name}"))


def set_aside(folder: Path) -> Path:
    """Give a folder that was refused another name, which leaves its own free, and return it; nothing is overwritten."""
    endings = chain([""], (f"-{number}" for number in count(2)))
    names = (folder.with_name(f"{folder.name}.refused{ending}") for ending in endings)
    aside = next(path for path in names if not path.exists())
    folder.rename(aside)
    _force_to_disk(folder.parent)
    return aside


def remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left; nobody else may be writing here."""
    for leftover in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def verify(folder: Path, names: tuple[str, ...]) -> None:
    """Compare files of a published folder with its manifest.

    Raises:
        CheckpointError: naming the first file that differs.
    """
    remedy = "it is damaged; the run's other checkpoints may be whole"
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name in names:
            found, expected = _describe(folder / name), manifest[name]
            if found != expected:
                raise CheckpointError(f"{folder / name} is {found}, its manifest says {expected}: {remedy}")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{folder} cannot be read ({error}): {remedy}") from error


def save_json(value: dict[str, Any], path: Path) -> None:
    """Write a file of indented JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _force_to_disk(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
