"""Checks that results can be written before anything else happens; cheap to import."""

import os
import stat
from pathlib import Path

from iwm_fast.pipelines.config import require


def require_writable(name: str, path: str) -> None:
    """Check that a folder or file can be written, or made with the folders above it; nothing is written.

    Args:
        name: setting that has the path, for messages.
        path: path to write to.

    Raises:
        ValueError: if something on the path is a file, cannot be entered, or does not allow writing.
    """
    target = Path(path)
    require(target.name != ".." and target != Path("/"), name, path, "name a folder of its own")
    for ancestor in (target, *target.parents):
        try:
            mode = ancestor.stat().st_mode
        except (FileNotFoundError, NotADirectoryError):
            require(
                not ancestor.is_symlink(), name, path, f"be a path that can be written: {ancestor} is a broken link"
            )
            continue
        except OSError as error:
            require(False, name, path, f"be a path that can be written: {error.strerror}")
            raise
        require(stat.S_ISDIR(mode), name, path, f"be a path that can be written: {ancestor} is a file")
        is_open = os.access(ancestor, os.W_OK | os.X_OK)
        require(is_open, name, path, f"be a path that can be written: there is no permission to write to {ancestor}")
        return
