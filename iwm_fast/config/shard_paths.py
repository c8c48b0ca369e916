"""Shard patterns that mean the same from any working directory; cheap to import."""

import re
from pathlib import Path


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
    # Alternatives in braces may hide where a name begins, as in {/a,/b}/train.tar. Patterns that begin with nested
    # braces are left alone.
    braces = re.match(r"\{([^{}]*)\}", pattern)
    starts = braces[1].split(",") if braces else [pattern]
    is_relative = "://" not in pattern and not any(start[:1] in ("/", "~", "{") for start in starts)
    return str(Path(folder, pattern)) if is_relative else pattern
