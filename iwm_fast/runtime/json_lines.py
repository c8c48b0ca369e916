"""Files of one JSON object per line, to which a run appends. A crash, or a disk, may have damaged any of the lines."""

import errno
import json
import os
from pathlib import Path
from typing import Any

from iwm_fast.pipelines.storage.atomic import name_disk_errors

STARTED_FILE = "started.jsonl"


def read_lines(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """Return the objects of a file, and the numbers, from 1, of the lines that hold none; nothing if it is absent.

    A last line without its end counts as damaged, even if what is there can be read.

    Raises:
        OSError: if the file cannot be read.
    """
    if not os.path.lexists(path):
        return [], []
    # A pipe would never end.
    if not path.is_file():
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    *lines, rest = path.read_bytes().split(b"\n")
    objects = [_parse(line) for line in lines]
    damaged = [number for number, value in enumerate(objects, start=1) if value is None]
    return [value for value in objects if value is not None], damaged + ([len(lines) + 1] if rest else [])


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(line.decode("utf-8"))
    # A flipped bit may also open brackets without end.
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def append_line(path: Path, value: dict[str, Any]) -> None:
    """Append an object; if a crash cut the last line short, the object begins a new one.

    Raises:
        DiskError: if the file cannot be written.
    """
    with name_disk_errors(path), path.open("a+b") as file:
        is_cut = file.seek(0, os.SEEK_END) > 0 and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n"
        file.write(b"\n" * is_cut + json.dumps(value).encode() + b"\n")


def read_starts(run_folder: Path) -> list[dict[str, Any]]:
    """Return what `started.jsonl` tells of each start of a run: command, commit, machine, run_id; [] if unreadable."""
    try:
        return read_lines(run_folder / STARTED_FILE)[0]
    except OSError:
        return []
