"""The files of an action log: written under a temporary name, published when complete, truncated on resume, and read.

    <run>/actions/step-00000000-00001000-rank-000.parquet     steps 0 .. 999, as rank 0 received them

The files may come from any numbers of ranks. A step is complete if its rows contain each slot of the global batch once.
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

# Programs that read complete folders (pyarrow, DuckDB) skip file names that begin with a dot.
_TEMPORARY_PREFIX = ".unfinished-"
_NAME_PATTERN = re.compile(r"step-(\d+)-(\d+)-rank-(\d+)\.parquet")

# Only these columns repeat often enough for a dictionary; trying to build one for random numbers triples the time of a
# write. The statistics of "step" let a reader skip groups of rows.
_PARQUET_OPTIONS = {
    "use_dictionary": ["step", "rank", "shard"],
    "write_statistics": ["step"],
    "compression": "zstd",
    "compression_level": 1,
}


class ActionLogError(Exception):
    """An action log cannot be read or does not match the request; the message names the file and the remedy."""


# `order=True`: files are sorted by the fields in this order, first by step and then by rank.
@dataclass(frozen=True, kw_only=True, order=True)
class LogFile:
    """A published file with the steps from `first_step` up to, but not including, `end_step`."""

    first_step: int
    end_step: int
    rank: int
    path: Path


class LogFileWriter:
    """Writes a file under a temporary name that readers skip, and gives it its final name when it is complete."""

    def __init__(self, folder: Path, rank: int, schema: pa.Schema) -> None:
        self._folder = folder
        self._rank = rank
        self.path = folder / f"{_TEMPORARY_PREFIX}rank-{rank:03}.parquet"
        self._file = self.path.open("wb")
        self._parquet = pq.ParquetWriter(self._file, schema, **_PARQUET_OPTIONS)
        self._first_step = -1
        self._end_step = -1

    def write(self, rows: pa.Table) -> None:
        """Append rows as a Parquet row group; their steps must not be lower than those written before."""
        self._parquet.write_table(rows, row_group_size=max(rows.num_rows, 1))
        step = rows.column("step")
        self._first_step = self._first_step if self._first_step >= 0 else step[0].as_py()
        self._end_step = step[-1].as_py() + 1

    def finish(self) -> None:
        """Write the footer of the file and force the file to disk; its name stays temporary."""
        self._parquet.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def publish(self) -> Path:
        """Finish the file and give it its final name, which is returned; at least one row must have been written.

        Raises:
            FileExistsError: if there is a file of this name.
            OSError: if the file cannot be written.
        """
        self.finish()
        final = self._folder / _file_name(self._first_step, self._end_step, self._rank)
        # `rename` would replace an existing file without an error.
        if final.exists():
            raise FileExistsError(f"{final} exists already; check that no other run writes to this folder")
        self.path.rename(final)
        # A rename survives a power failure only once its folder is on disk.
        force_to_disk(self._folder)
        return final

    def discard(self) -> None:
        """Close and remove the temporary file, and ignore errors of the file system."""
        for remove in (self._parquet.close, self._file.close, self.path.unlink):
            with suppress(OSError):
                remove()


def list_log_files(folder: Path) -> list[LogFile]:
    """Return the published files of a log, sorted by step and rank; empty if the folder does not exist."""
    matches = [(path, _NAME_PATTERN.fullmatch(path.name)) for path in folder.glob("*.parquet")]
    return sorted(
        LogFile(first_step=int(match[1]), end_step=int(match[2]), rank=int(match[3]), path=path)
        for path, match in matches
        if match
    )


def truncate_from(folder: Path, step: int) -> None:
    """Remove the rows of this step and of all later steps, and the temporary files of killed processes.

    No process may write to the folder meanwhile.

    Raises:
        OSError: if a file cannot be removed or written.
        ActionLogError: if a file that must be truncated is damaged.
    """
    if not folder.is_dir():
        return
    for leftover in folder.glob(f"{_TEMPORARY_PREFIX}*"):
        leftover.unlink()
    for file in list_log_files(folder):
        if file.first_step >= step:
            file.path.unlink()
        elif file.end_step > step:
            _truncate(file, step)
    force_to_disk(folder)


def _truncate(file: LogFile, step: int) -> None:
    """Remove a file's rows from this step on.

    Files end at checkpoints, so a file reaches past the checkpoint that a run resumes from only if that checkpoint was
    copied from elsewhere.
    """
    folder = file.path.parent
    remaining_rows = _read(file, file.first_step, step)
    writer = LogFileWriter(folder, file.rank, remaining_rows.schema)
    writer.write(remaining_rows)
    writer.finish()
    # First the rows are replaced, then the name. If the process is killed in between, the name still promises the
    # removed steps, and the next resume truncates the file again.
    writer.path.replace(file.path)
    file.path.rename(folder / _file_name(file.first_step, step, file.rank))


def read_step(folder: Path, step: int) -> pa.Table:
    """Return the rows of one step, of all ranks, sorted by slot.

    Raises:
        ActionLogError: if there is no log, a row is missing or occurs twice, or a file is damaged.
    """
    return read_rows(folder, step, step + 1)


def read_rows(folder: Path, first_step: int, end_step: int) -> pa.Table:
    """Return the rows of steps `first_step` .. `end_step` - 1, of all ranks, sorted by step and slot.

    Raises:
        ActionLogError: if there is no log, a row is missing or occurs twice, or a file is damaged.
    """
    all_files = list_log_files(folder)
    if not all_files:
        raise ActionLogError(f"{folder} holds no action log; train with output.action_log=true to write one")
    files = [file for file in all_files if file.first_step < end_step and file.end_step > first_step]
    tables = [_read(file, first_step, end_step) for file in files]
    if sum(table.num_rows for table in tables) == 0:
        steps = f"step {first_step} is" if end_step == first_step + 1 else f"steps {first_step} .. {end_step - 1} are"
        raise ActionLogError(f"{steps} not in {folder}, which holds steps {describe_steps(all_files)}")
    size = _common_batch_size(files, tables)
    joined = pa.concat_tables(tables).unify_dictionaries()
    # One number per row, which both sorts the rows and shows duplicate and missing ones.
    position = column(joined, "step").astype(np.int64) * size + column(joined, "slot")
    order = np.argsort(position, kind="stable")
    position = position[order]
    _require_unique(position, size, files)
    where = f"{folder}, which holds steps {describe_steps(all_files)}"
    _require_complete(position, np.arange(first_step * size, end_step * size), size, where)
    return joined.take(order)


def describe_steps(files: list[LogFile]) -> str:
    """Return the ranges of steps that sorted files hold, for example "0 .. 9, 20 .. 29"."""
    return ", ".join(f"{first} .. {end - 1}" for first, end in _step_ranges(files))


def _step_ranges(files: list[LogFile]) -> Iterator[tuple[int, int]]:
    """Yield first and end step of each maximal range without a gap; files of several ranks may overlap."""
    first, end = files[0].first_step, files[0].end_step
    for file in files[1:]:
        if file.first_step > end:
            yield first, end
            first = file.first_step
        end = max(end, file.end_step)
    yield first, end


def _read(file: LogFile, first_step: int, end_step: int) -> pa.Table:
    try:
        return pq.read_table(file.path, filters=[("step", ">=", first_step), ("step", "<", end_step)])
    except (OSError, pa.ArrowException) as error:
        raise ActionLogError(
            f"{file.path} cannot be read ({error}); if it is damaged, move it away: the log then lacks its steps"
        ) from error


def _common_batch_size(files: list[LogFile], tables: list[pa.Table]) -> int:
    """Return the global batch size of all files, after checking that they were written with the same settings."""
    # The path of the shards may differ between launches; their content is compared by its digest.
    metadata = [replace(read_metadata(table.schema), shards="") for table in tables]
    for (file, settings), (next_file, next_settings) in pairwise(zip(files, metadata, strict=True)):
        if settings != next_settings:
            raise ActionLogError(
                f"{file.path.name} and {next_file.path.name} of {file.path.parent} were written with other settings; "
                "read the steps before and after such a change (data.restart_epoch) separately"
            )
    return metadata[0].global_batch_size


def _require_unique(position: Int64[np.ndarray, "rows"], size: int, files: list[LogFile]) -> None:
    duplicates = np.flatnonzero(position[1:] == position[:-1])
    if len(duplicates):
        step, slot = divmod(int(position[duplicates[0]]), size)
        names = ", ".join(file.path.name for file in files if file.first_step <= step < file.end_step)
        raise ActionLogError(
            f"{len(duplicates)} rows occur twice in {files[0].path.parent}, the first is step {step}, slot {slot}, "
            f"in {names}; move the file away that does not belong to the run"
        )


def _require_complete(
    position: Int64[np.ndarray, "rows"], expected: Int64[np.ndarray, "all_rows"], size: int, where: str
) -> None:
    missing = np.setdiff1d(expected, position, assume_unique=True)
    if len(missing):
        step, slot = divmod(int(missing[0]), size)
        raise ActionLogError(
            f"{len(missing)} rows are missing in {where}, the first is step {step}, slot {slot}; "
            "a step that was in progress when its run ended is incomplete"
        )


def _file_name(first_step: int, end_step: int, rank: int) -> str:
    return f"step-{first_step:08}-{end_step:08}-rank-{rank:03}.parquet"
