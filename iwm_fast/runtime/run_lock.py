"""Locks on folders: one training run at a time in a run folder, one writer at a time elsewhere."""

import fcntl
import logging
from pathlib import Path
from typing import IO

from iwm_fast.runtime.run_status import read_status

log = logging.getLogger(__name__)

_FILE = ".lock"


def lock_folder(folder: Path, *, wait: bool) -> IO[str]:
    """Create a folder if it is not there, and return a file that locks it until it is closed or the process ends.

    Args:
        folder: what to lock.
        wait: whether to wait while another process holds the lock.

    Raises:
        BlockingIOError: if another process holds the lock and `wait` is false.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / _FILE).open("a", encoding="ascii")
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                file.close()
                raise
            log.info("waiting for another process, which writes into %s", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
    except BlockingIOError:
        raise
    except OSError as error:
        # some shared file systems have no locks
        log.warning("%s cannot be locked (%s): make sure that nothing else writes there", folder, error)
    return file


class FolderLock:
    """Holds a run folder until it is closed or its process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Take the folder, which is created if it is not there.

        Raises:
            ValueError: if another run holds it.
        """
        self._folder = folder
        try:
            self._file = lock_folder(folder, wait=False)
        except BlockingIOError:
            other = read_status(folder)
            raise ValueError(
                f"output.folder = {str(folder)!r} is in use by another run (last heard of as process "
                f"{other.get('pid')} on {other.get('host')}); wait until it ends, stop it, or name another folder"
            ) from None

    def close(self) -> None:
        """Release the folder; one into which nothing was written is removed."""
        if [path.name for path in self._folder.iterdir()] == [_FILE]:
            (self._folder / _FILE).unlink()
            self._folder.rmdir()
        self._file.close()
