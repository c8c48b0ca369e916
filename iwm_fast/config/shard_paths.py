"""Shard patterns that mean the same from any working directory; cheap to import."""

import os
from pathlib import Path

from braceexpand import braceexpand


def absolute_shards(spec: str) -> str:
    """Return a shard pattern, written like data.train, with its relative local names made absolute.

    Remote addresses, absolute paths and paths below `~` stay as they are.
    """
    return "::".join(_absolute(pattern.strip()) for pattern in spec.split("::"))


def _absolute(pattern: str) -> str:
    folder = str(Path.cwd())
    # In the name of the working directory, these characters would become part of the pattern.
    if not pattern or set("{}*?") & set(folder) or "::" in folder:
        return pattern
    try:
        # Braces may hide where a name begins, as in {/a,/b}/train.tar.
        is_relative = not any(os.path.isabs(name) or "://" in name or name[:1] == "~" for name in braceexpand(pattern))
    except ValueError:
        # A malformed pattern is reported where the shards are opened.
        return pattern
    return str(Path(folder, pattern)) if is_relative else pattern
