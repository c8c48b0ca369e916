"""Files and folders that are there complete or not at all, and folders that tell when they were damaged later.

The files of a folder are written into a temporary one beside it and forced to disk, then a manifest with the size and
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


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it there: readers see the old one or all of the new one.

    Args:
        path: the file; an earlier one is replaced.
        write: writes the file at the path that it is given.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        write(draft)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def force_to_disk(path: Path) -> None:
    """Return when the file's content, or the folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(folder: Path, writers: dict[str, Callable[[Path], None]]) -> None:
    """Make a folder of the files that the writers write, by file name.

    Raises:
        FileExistsError: if the folder exists.
        OSError: if the disk is full or does not let us.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; move it away or choose another folder")
    draft = folder.parent / f"{_TEMPORARY}{folder.name}"
    shutil.rmtree(draft, ignore_errors=True)
    is_first = not folder.parent.exists()
    draft.mkdir(parents=True)
    try:
        for name, write_file in writers.items():
            write_file(draft / name)
            force_to_disk(draft / name)
        save_json({name: _describe(draft / name) for name in writers}, draft / MANIFEST)
        for name in writers:
            # safetensors makes files that nobody else may read
            (draft / name).chmod((draft / MANIFEST).stat().st_mode)
        force_to_disk(draft / MANIFEST)
        force_to_disk(draft)
        draft.rename(folder)
    except BaseException:
        # on a full disk this gives the room back
        shutil.rmtree(draft, ignore_errors=True)
        raise
    force_to_disk(folder.parent)
    if is_first:
        force_to_disk(folder.parent.parent)


def remove(folder: Path) -> None:
    """Remove a published folder so that half of it is never seen."""
    shutil.rmtree(folder.rename(folder.parent / f"{_TEMPORARY}removing-{folder.name}"))


def set_aside(folder: Path) -> Path:
    """Give a folder that was refused another name, which leaves its own free, and return it; nothing is overwritten."""
    endings = chain([""], (f"-{number}" for number in count(2)))
    names = (folder.with_name(f"{folder.name}.refused{ending}") for ending in endings)
    aside = next(path for path in names if not path.exists())
    folder.rename(aside)
    force_to_disk(folder.parent)
    return aside


def remove_leftovers(parent: Path) -> None:
    """Remove what killed processes left; nobody else may be writing here."""
    for leftover in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def verify(folder: Path, names: tuple[str, ...]) -> None:
    """Compare files of a published folder with its manifest.

    Raises:
        OSError: naming the first file that is missing or differs.
    """
    differs = ""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name in names:
            found, expected = _describe(folder / name), manifest[name]
            if found != expected:
                differs = f"{folder / name} is {found}, its manifest says {expected}"
                break
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise OSError(f"{folder} cannot be read ({error})") from error
    if differs:
        raise OSError(differs)


def save_json(value: dict[str, Any], path: Path) -> None:
    """Write a file of indented JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
