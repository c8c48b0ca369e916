"""Files and folders that appear complete or not at all, and folders whose later damage is detected.

The files of a folder are written into a temporary folder next to it and forced to disk, followed by a manifest with the
size and SHA-256 of each file. Then the folder is renamed, so that readers see either all of it or nothing. Errors of
the disk name the file and the remedy.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import chain, count
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"

_TEMPORARY = ".unfinished-"

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
# What fsync of a folder gives on network and FUSE file systems that have no such operation. They store a rename when it
# happens, or never promise to.
_NO_FOLDER_SYNC = (
    errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM, errno.ENOSYS, errno.EISDIR
)  # fmt: skip


class DiskError(OSError):
    """A file or folder cannot be written; the message names it and the remedy."""

    def __str__(self) -> str:
        return self.strerror or ""


@contextmanager
def name_disk_errors(path: Path) -> Iterator[None]:
    """Name a path that is being written, and a remedy, in errors of the file system that occur meanwhile.

    Raises:
        DiskError: in place of an OSError with a number, which stays its `errno`.
    """
    try:
        yield
    except OSError as error:
        # An error without a number comes from a library, or has a text of its own.
        if isinstance(error, DiskError) or error.errno is None or _is_of_another_file(error, path):
            raise
        text = f"{path} cannot be written: {os.strerror(error.errno)}; {disk_remedy(error)}"
        raise DiskError(error.errno, text) from error


def _is_of_another_file(error: OSError, path: Path) -> bool:
    """Return whether an error names a file that is neither the path nor beside or below it."""
    # What is written is written under a draft's name beside the path first.
    return error.filename is not None and path.parent not in Path(os.fsdecode(error.filename)).parents


def disk_remedy(error: OSError) -> str:
    """Return what the user can do about an error of the file system."""
    if error.errno in DISK_IS_FULL:
        return "free space there, or raise the quota"
    if error.errno == errno.EFBIG:
        return "raise the limit on the size of files (ulimit -f)"
    if error.errno == errno.EROFS:
        return "its file system is mounted read-only: mount it writable, or choose another folder"
    if error.errno in (errno.EACCES, errno.EPERM):
        return "change its permissions, or choose another folder"
    if error.errno in (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY):
        return "a file and a folder have the same name: move one of them away"
    return "check the disk or the network file system"


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file, force it to disk and rename it to `path`: readers see either the old file or the new one.

    Args:
        path: the file; an existing one is replaced.
        write: called with the path of the temporary file, which it writes.

    Raises:
        DiskError: if it cannot be written.
    """
    # The ids keep processes and threads that replace the same file from writing into one temporary file.
    draft = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.draft")
    with name_disk_errors(path):
        try:
            write(draft)
            # A rename is atomic but not ordered after earlier writes: after a power failure, the final name could
            # stand on an empty file.
            force_to_disk(draft)
            draft.replace(path)
        except BaseException:
            with suppress(OSError):
                draft.unlink()
            raise
        force_to_disk(path.parent)


def force_to_disk(path: Path) -> None:
    """Return once a file's content, or a folder's list of names, is on the disk.

    File systems that cannot force a folder to disk are accepted.
    """
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if not (is_folder and error.errno in _NO_FOLDER_SYNC):
            raise


def write_folder(folder: Path, writers: dict[str, Callable[[Path], None]]) -> None:
    """Create a folder with a manifest and one file per entry of `writers`: file name -> function that writes it.

    Raises:
        FileExistsError: if the folder exists.
        DiskError: if it cannot be written, for instance because the disk is full.
    """
    if os.path.lexists(folder):
        raise FileExistsError(f"{folder} exists already; move it away or choose another folder")
    with name_disk_errors(folder):
        _write_folder(folder, writers)


def _write_folder(folder: Path, writers: dict[str, Callable[[Path], None]]) -> None:
    draft = folder.parent / f"{_TEMPORARY}{folder.name}"
    # A process that was killed may have left an unfinished folder under this name.
    if os.path.lexists(draft):
        _remove(draft)
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


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes of this machine out of a folder while the `with` block runs.

    Raises:
        FileExistsError: if another process has locked it.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"another process is writing to {folder}; wait for it to end") from None
        # Some network file systems cannot lock folders.
        except OSError as error:
            log.warning("%s cannot be locked (%s); do not write into it twice at a time", folder, error.strerror)
        yield
    finally:
        os.close(descriptor)


def remove_folder(folder: Path) -> None:
    """Remove a published folder; it is renamed first, so that readers never see a part of it."""
    _remove(folder.rename(folder.parent / f"{_TEMPORARY}removing-{folder.name}"))


def set_aside(path: Path, why: str = "refused") -> Path:
    """Rename a file or folder to the first unused NAME.WHY, NAME.WHY-2, ... and return the new path."""
    endings = chain([""], (f"-{number}" for number in count(2)))
    candidates = (path.with_name(f"{path.name}.{why}{ending}") for ending in endings)
    # A link to a missing file does not "exist", but renaming would replace it.
    new_path = next(candidate for candidate in candidates if not os.path.lexists(candidate))
    path.rename(new_path)
    force_to_disk(path.parent)
    return new_path


def remove_unfinished(parent: Path) -> None:
    """Remove the unfinished folders of killed processes; no other process may be writing to `parent`."""
    for leftover in parent.glob(f"{_TEMPORARY}*"):
        _remove(leftover)


def _remove(path: Path) -> None:
    """Remove a folder, a file, or a link but not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def verify_manifest(folder: Path, names: tuple[str, ...]) -> None:
    """Compare files of a published folder with its manifest.

    Raises:
        OSError: naming the first file that is missing or differs, or the manifest if that is damaged.
    """
    path = folder / MANIFEST
    # Reading a pipe would wait for a writer.
    if path.exists() and not path.is_file():
        raise OSError(f"{path} cannot be read (it is no regular file)")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        expected = {name: manifest[name] for name in names}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise OSError(f"{path} cannot be read ({error})") from error
    for name in names:
        actual = _describe(folder / name)
        if actual != expected[name]:
            raise OSError(f"{folder / name} is {actual}, but its manifest records {expected[name]}")


def write_json(value: dict[str, Any], path: Path) -> None:
    """Write a file of indented JSON."""
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _describe(path: Path) -> dict[str, Any]:
    # A pipe would never end.
    if not path.is_file():
        raise OSError(f"{path} is missing, or no regular file")
    with path.open("rb") as file:
        return {"size_bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
