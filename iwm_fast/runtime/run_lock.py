"""One run at a time in a run folder."""

import fcntl
import logging
from pathlib import Path

from iwm_fast.runtime.run_status import read_status

log = logging.getLogger("iwm_fast")

_FILE = ".lock"


class FolderLock:
    """Holds a run folder until it is closed or its process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Take the folder, which is made if it is not there.

        Raises:
            ValueError: if another run holds it.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._file = folder, (folder / _FILE).open("a", encoding="ascii")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            other = read_status(folder)
            raise ValueError(
                f"output.folder = {str(folder)!r} is in use by another run (last heard of as process "
                f"{other.get('pid')} on {other.get('host')}); wait until it ends, stop it, or name another folder"
            ) from None
        except OSError as error:
            # some shared file systems know no locks
            log.warning("%s cannot be locked (%s): see to it that no other run writes there", folder, error)

    def close(self) -> None:
        """Let go; a folder into which nothing was written goes, too."""
        if [path.name for path in self._folder.iterdir()] == [_FILE]:
            (self._folder / _FILE).unlink()
            self._folder.rmdir()
        self._file.close()
