"""Files and folders that appear complete or not at all, and folders whose later damage is detected.

The files of a folder are written into a temporary folder next to it and forced to disk, followed by a manifest with the
size and SHA-256 of each file. Then the folder is renamed, so that readers see either all of it or nothing.
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
    """Write a temporary file and rename it to `path`, so that readers see either the old file or the new one.

    Args:
        path: the file; an existing one is replaced.
        write: called with the path of the temporary file, which it writes.
    """
    # The process id keeps processes that replace the same file from writing into one temporary file.
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    try:
        write(draft)
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def force_to_disk(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_folder(folder: Path, writers: dict[str, Callable[[Path], None]]) -> None:
    """Create a folder with a manifest and one file per entry of `writers`: file name -> function that writes it.

    Raises:
        FileExistsError: if the folder exists.
        OSError: if it cannot be written, for instance because the disk is full.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; move it away or choose another folder")
    draft = folder.parent / f"{_TEMPORARY}{folder.name}"
    # A process that was killed may have left an unfinished folder under this name.
    shutil.rmtree(draft, ignore_errors=True)
    is_first = not folder.parent.exists()
    draft.mkdir(parents=True)
    try:
        for name, write_file in writers.items():
            write_file(draft / name)
            force_to_disk(draft / name)
        write_json({name: _describe(draft / name) for name in writers}, draft / MANIFEST)
        for name in writers:
            # safetensors creates files that only their owner may read; the manifest's mode follows the umask.
            (draft / name).chmod((draft / MANIFEST).stat().st_mode)
        # A rename is atomic but not ordered after earlier writes: without these calls, a power failure could leave the
        # final name on a folder whose files or names are missing.
        force_to_disk(draft / MANIFEST)
        force_to_disk(draft)
        draft.rename(folder)
    except BaseException:
        # On a full disk this frees the space again.
        shutil.rmtree(draft, ignore_errors=True)
        raise
    # The new name itself is an entry of the parent folder, and a new parent is an entry of the grandparent.
    force_to_disk(folder.parent)
    if is_first:
        force_to_disk(folder.parent.parent)


def remove_folder(folder: Path) -> None:
    """Remove a published folder; it is renamed first, so that readers never see a part of it."""
    shutil.rmtree(folder.rename(folder.parent / f"{_TEMPORARY}removing-{folder.name}"))


def set_aside(folder: Path) -> Path:
    """Rename a refused folder to the first unused NAME.refused, NAME.refused-2, ... and return the new path."""
    endings = chain([""], (f"-{number}" for number in count(2)))
    candidates = (folder.with_name(f"{folder.name}.refused{ending}") for ending in endings)
    new_path = next(path for path in candidates if not path.exists())
    folder.rename(new_path)
    force_to_disk(folder.parent)
    return new_path


def remove_unfinished(parent: Path) -> None:
    """Remove the unfinished folders of killed processes; no other process may be writing to `parent`."""
    for leftover in parent.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover)


def verify_manifest(folder: Path, names: tuple[str, ...]) -> None:
    """Compare files of a published folder with its manifest.

    Raises:
        OSError: naming the first file that is missing or differs.
    """
    difference = ""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name in names:
            actual, expected = _describe(folder / name), manifest[name]
            if actual != expected:
                difference = f"{folder / name} is {actual}, but its manifest records {expected}"
                break
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise OSError(f"{folder} cannot be read ({error})") from error
    # Raised outside the try block, which would report it as a folder that cannot be read.
    if difference:
        raise OSError(difference)


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write a file of indented JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
