"""Locks on folders: one training run at a time in a run folder, one writer at a time in other folders."""

import errno
import fcntl
import logging
from pathlib import Path
from typing import IO

from iwm_fast.pipelines.storage.atomic import name_disk_errors
from iwm_fast.runtime.run_status import read_status

log = logging.getLogger(__name__)

_LOCK_FILE = ".lock"


def lock_folder(folder: Path, *, wait: bool) -> IO[str]:
    """Lock a folder, creating it if it does not exist.

    Args:
        folder: the folder to lock.
        wait: whether to wait while another process holds the lock.

    Returns:
        The open lock file, which holds the lock until it is closed or the process ends.

    Raises:
        BlockingIOError: if another process holds the lock and `wait` is false.
        DiskError: if the folder cannot be written.
    """
    path = folder / _LOCK_FILE
    with name_disk_errors(path):
        folder.mkdir(parents=True, exist_ok=True)
        # Opening a pipe would wait for a reader.
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        file = path.open("a", encoding="ascii")
    try:
        # The kernel releases the lock however the process ends, so a killed run leaves no stale lock.
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                file.close()
                raise
            log.info("waiting for another process that writes to %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
    except BlockingIOError:
        raise
    except OSError as error:
        # Some shared file systems have no locks; they are still good enough for a single run.
        log.warning("%s cannot be locked (%s): make sure that no other process writes there", folder, error)
    return file


class RunLock:
    """An exclusive lock on a run folder, held until it is closed or the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Lock the folder, creating it if it does not exist.

        Raises:
            ValueError: if another run holds the lock.
        """
        self._folder = folder
        try:
            self._file = lock_folder(folder, wait=False)
        except BlockingIOError:
            status = read_status(folder)
            raise ValueError(
                f"output.folder = {str(folder)!r} is in use by another run (last reported by process "
                f"{status.get('pid')} on {status.get('host')}); wait until it ends, stop it, or name another folder"
            ) from None

    def close(self) -> None:
        """Release the lock, and remove the folder if nothing else was written to it."""
        if [path.name for path in self._folder.iterdir()] == [_LOCK_FILE]:
            (self._folder / _LOCK_FILE).unlink()
            self._folder.rmdir()
        self._file.close()
