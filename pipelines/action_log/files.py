"""The action log's files: written under a temporary name, published whole, cut back to a checkpoint, read.

    <run>/actions/step-00000000-00001000-rank-000.parquet     steps 0 .. 999, as rank 0 received them

Any number of ranks may have written any steps. A step is whole when its rows have each slot of the global batch once.
"""

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from iwm_fast.pipelines.action_log.schema import column, read_metadata
from iwm_fast.pipelines.storage.atomic import force_to_disk

# readers of whole folders (pyarrow, DuckDB) pass over names that begin with a dot
_TEMPORARY = ".unfinished-"
_NAME = re.compile(r"step-(\d+)-(\d+)-rank-(\d+)\.parquet")

# random numbers repeat too seldom for a dictionary: trying to make one triples the time
_STORAGE = {
    "use_dictionary": ["step", "rank", "shard"],
    "write_statistics": ["step"],
    "compression": "zstd",
    "compression_level": 1,
}


class ActionLogError(Exception):
    """An action log cannot be read or does not fit; says where and what to do."""


@dataclass(frozen=True, kw_only=True, order=True)
class LogFile:
    """One published file."""

    first_step: int
    end_step: int
    """The step behind the last one."""
    rank: int
    path: Path


class LogFileWriter:
    """A part while it is written, under a name that nobody reads."""

    def __init__(self, folder: Path, rank: int, schema: pa.Schema) -> None:
        self._folder, self._rank = folder, rank
        self.path = folder / f"{_TEMPORARY}rank-{rank:03}.parquet"
        self._file = self.path.open("wb")
        self._parquet = pq.ParquetWriter(self._file, schema, **_STORAGE)
        self._first_step, self._end_step = -1, -1

    def write(self, rows: pa.Table) -> None:
        """Append a group of rows; steps must not go back."""
        self._parquet.write_table(rows, row_group_size=max(rows.num_rows, 1))
        step = rows.column("step")
        self._first_step = self._first_step if self._first_step >= 0 else step[0].as_py()
        self._end_step = step[-1].as_py() + 1

    def finish(self) -> None:
        """Write the end of the file and force it to disk; the name stays temporary."""
        self._parquet.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def publish(self) -> Path:
        """Finish, and give the file its name; at least one row was written.

        Raises:
            OSError: if the disk is full or does not let us, or there is such a part already.
        """
        self.finish()
        final = self._folder / _name(self._first_step, self._end_step, self._rank)
        if final.exists():
            raise FileExistsError(f"{final} exists already: does another run write here?")
        self.path.rename(final)
        force_to_disk(self._folder)
        return final

    def discard(self) -> None:
        """Remove what was written, as far as the disk lets us."""
        for remove in (self._parquet.close, self._file.close, self.path.unlink):
            with suppress(OSError):
                remove()


def list_log_files(folder: Path) -> list[LogFile]:
    """Return the published files of a log in order of step and rank, none if there is no such folder."""
    matches = [(path, _NAME.fullmatch(path.name)) for path in folder.glob("*.parquet")]
    return sorted(
        LogFile(first_step=int(match[1]), end_step=int(match[2]), rank=int(match[3]), path=path)
        for path, match in matches
        if match
    )


def truncate_from(folder: Path, step: int) -> None:
    """Remove the rows of this step and all behind it, and what killed processes left; nobody may be writing here.

    Raises:
        OSError: if the disk is full or does not let us.
        ActionLogError: if a part that must be cut is damaged.
    """
    if not folder.is_dir():
        return
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        leftover.unlink()
    for part in list_log_files(folder):
        if part.first_step >= step:
            part.path.unlink()
        elif part.end_step > step:
            _cut(part, step)
    force_to_disk(folder)


def _cut(part: LogFile, step: int) -> None:
    """Remove a part's rows from this step on.

    A part ends where a checkpoint is, so this is needed only for a checkpoint that was put there by hand.
    """
    folder = part.path.parent
    kept = _read(part, part.first_step, step)
    draft = LogFileWriter(folder, part.rank, kept.schema)
    draft.write(kept)
    draft.finish()
    # rows first, then the name: whatever ends the process in between leaves a part that is cut once more
    draft.path.replace(part.path)
    part.path.rename(folder / _name(part.first_step, step, part.rank))


def read_step(folder: Path, step: int) -> pa.Table:
    """Return the rows of one step, of all ranks, in order of slot; raises as `read_rows`."""
    return read_rows(folder, step, step + 1)


def read_rows(folder: Path, first_step: int, end_step: int) -> pa.Table:
    """Return the rows of steps `first_step` .. `end_step` - 1, of all ranks, in order of step and slot.

    Raises:
        ActionLogError: if there is no log, a row is missing or there twice, or a file is damaged; says which.
    """
    every = list_log_files(folder)
    if not every:
        raise ActionLogError(f"{folder} holds no action log; train with output.action_log=true to get one")
    chosen = [part for part in every if part.first_step < end_step and part.end_step > first_step]
    tables = [_read(part, first_step, end_step) for part in chosen]
    if sum(table.num_rows for table in tables) == 0:
        asked = f"step {first_step} is" if end_step == first_step + 1 else f"steps {first_step} .. {end_step - 1} are"
        raise ActionLogError(f"{asked} not in {folder}, which holds steps {describe_steps(every)}")
    size = _common_batch_size(chosen, tables)
    joined = pa.concat_tables(tables).unify_dictionaries()
    position = column(joined, "step").astype(np.int64) * size + column(joined, "slot")
    order = np.argsort(position, kind="stable")
    position = position[order]
    _require_once(position, size, chosen)
    where = f"{folder}, which holds steps {describe_steps(every)}"
    _require_all(position, np.arange(first_step * size, end_step * size), size, where)
    return joined.take(order)


def describe_steps(every: list[LogFile]) -> str:
    """Say which steps these parts, given in order, hold: "0 .. 9, 20 .. 29"."""
    return ", ".join(f"{first} .. {end - 1}" for first, end in _ranges(every))


def _ranges(every: list[LogFile]) -> Iterator[tuple[int, int]]:
    first, end = every[0].first_step, every[0].end_step
    for part in every[1:]:
        if part.first_step > end:
            yield first, end
            first = part.first_step
        end = max(end, part.end_step)
    yield first, end


def _read(part: LogFile, first_step: int, end_step: int) -> pa.Table:
    try:
        return pq.read_table(part.path, filters=[("step", ">=", first_step), ("step", "<", end_step)])
    except (OSError, pa.ArrowException) as error:
        raise ActionLogError(
            f"{part.path} cannot be read ({error}); if it is damaged, move it away: the log then lacks its steps"
        ) from error


def _common_batch_size(chosen: list[LogFile], tables: list[pa.Table]) -> int:
    # where the shards lie may change from launch to launch
    heads = [replace(read_metadata(table.schema), shards="") for table in tables]
    for (part, head), (other, next_head) in pairwise(zip(chosen, heads, strict=True)):
        if head != next_head:
            raise ActionLogError(
                f"{part.path.name} and {other.path.name} of {part.path.parent} were written with other settings; "
                "read the steps on either side of such a change (data.restart_epoch) one by one"
            )
    return heads[0].global_batch_size


def _require_once(position: Int64[np.ndarray, "rows"], size: int, chosen: list[LogFile]) -> None:
    twice = np.flatnonzero(position[1:] == position[:-1])
    if len(twice):
        step, slot = divmod(int(position[twice[0]]), size)
        names = ", ".join(part.path.name for part in chosen if part.first_step <= step < part.end_step)
        raise ActionLogError(
            f"{len(twice)} rows are there twice in {chosen[0].path.parent}, the first is step {step}, slot {slot}, "
            f"in {names}; move the file away that is not the run's"
        )


def _require_all(
    position: Int64[np.ndarray, "rows"], expected: Int64[np.ndarray, "all_rows"], size: int, where: str
) -> None:
    missing = np.setdiff1d(expected, position, assume_unique=True)
    if len(missing):
        step, slot = divmod(int(missing[0]), size)
        raise ActionLogError(
            f"{len(missing)} rows are missing in {where}, the first is step {step}, slot {slot}; "
            "a step that was under way when its run ended is not whole"
        )


def _name(first_step: int, end_step: int, rank: int) -> str:
    return f"step-{first_step:08}-{end_step:08}-rank-{rank:03}.parquet"
