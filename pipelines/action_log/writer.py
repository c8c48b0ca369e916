"""The action log: every sample that training received, with all its random parameters, written in the background.

`ActionLog.add` only keeps references. A thread converts them to rows and writes these. `publish` publishes the rows
and must be called before a checkpoint is published, so that the log covers all steps of the checkpoint. Rows that are
not published when the process dies are lost, but the run that resumes from the checkpoint writes them again.
"""

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from iwm_fast.pipelines.action_log.files import LogFileWriter
from iwm_fast.pipelines.action_log.schema import BatchRecord, LogMetadata, RowBuilder
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.storage.atomic import disk_remedy
from iwm_fast.pipelines.storage.shard_set import ShardSet

log = logging.getLogger(__name__)

# A row takes about 200 bytes in memory and 90 to 120 bytes on disk, so a group takes 3 MB and a file 100 MB.
GROUP_ROWS = 16_384
FILE_ROWS = 1_048_576

# With this many groups not written yet, `ActionLog.add` waits for the disk before it hands over another group.
_MAX_PENDING_GROUPS = 2


class ActionLog:
    """Writes the rows of one rank's batches, in the order in which they are added."""

    def __init__(
        self,
        folder: Path,
        *,
        head: LogMetadata,
        shards: ShardSet,
        rank: int,
        group_rows: int = GROUP_ROWS,
        file_rows: int = FILE_ROWS,
    ) -> None:
        """Create the folder and start the thread.

        A log that is resumed must have been truncated by `iwm_fast.pipelines.action_log.files.truncate_from` before any
        rank opens it, since that function removes unfinished files.

        Args:
            group_rows: number of rows that are converted and written together.
            file_rows: number of rows after which a file is published at the next step, with or without a checkpoint.

        Raises:
            OSError: if the folder cannot be created.
        """
        self._folder = folder
        self._rank = rank
        self._row_builder = RowBuilder(head, shards, rank)
        self._group_rows = group_rows
        self._file_rows = file_rows
        self._pending: list[BatchRecord] = []
        self._num_pending_rows = 0
        self._num_file_rows = 0
        self._last_step = -1
        # A single thread writes, so groups reach the file in the order in which they were handed over.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="action-log")
        self._submitted: deque[Future[None]] = deque()
        self.failure: Exception | None = None
        """The first error of the thread; later rows are lost."""
        # Only the thread uses this attribute.
        self._file: LogFileWriter | None = None
        with _remedy_note(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, batch: Batch) -> Batch:
        """Add a batch to the log and return it, so that `map(log.add, loader)` is a loader that logs.

        Raises:
            OSError: if rows that were added before could not be written.
        """
        self._raise_failure()
        # Files end between two steps: a step is never spread over two files of a rank.
        if self._num_file_rows >= self._file_rows and batch.step != self._last_step:
            self._submit_pending(ends_file=True)
        self._pending.append(BatchRecord.from_batch(batch))
        self._last_step = batch.step
        self._num_pending_rows += len(batch.key)
        self._num_file_rows += len(batch.key)
        if self._num_pending_rows >= self._group_rows:
            self._submit_pending(ends_file=False)
        return batch

    def publish(self) -> None:
        """Write and publish all rows that were added, and return once they are on disk.

        Raises:
            OSError: if they could not be written; no incomplete file is left.
        """
        self._submit_pending(ends_file=True).result()
        self._raise_failure()

    def close(self) -> None:
        """Publish the remaining rows if possible and stop the thread; an error is logged and not raised.

        This also runs after training failed. The user must then see the error of training, and the last rows of the log
        name the samples on which it failed.
        """
        self._submit_pending(ends_file=True)
        self._thread.shutdown()
        if self.failure is not None:
            log.warning("the action log in %s lacks its last rows: %s", self._folder, self.failure)

    def _submit_pending(self, *, ends_file: bool) -> Future[None]:
        """Let the thread write the pending rows, and publish the file if it ends."""
        if len(self._submitted) >= _MAX_PENDING_GROUPS:
            # With a slow disk training waits here; otherwise the groups would accumulate until memory is exhausted.
            self._submitted.popleft().result()
        future = self._thread.submit(self._write, self._pending, ends_file)
        self._submitted.append(future)
        self._pending = []
        self._num_pending_rows = 0
        self._num_file_rows = 0 if ends_file else self._num_file_rows
        return future

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _write(self, batches: list[BatchRecord], ends_file: bool) -> None:
        """Write a group of rows and publish the file if it ends; runs on the thread."""
        if self.failure is not None:
            return
        try:
            with _remedy_note(self._folder):
                self._write_group(batches, ends_file)
        # Errors of any kind are kept: `add` and `publish` raise them on the training thread.
        except Exception as error:
            self.failure = error
            if self._file is not None:
                self._file.discard()

    def _write_group(self, batches: list[BatchRecord], ends_file: bool) -> None:
        if batches:
            # The file is opened with its first rows, since a file without rows has no first step to be named after.
            self._file = self._file or LogFileWriter(self._folder, self._rank, self._row_builder.schema)
            self._file.write(self._row_builder.build(batches))
        if ends_file and self._file is not None:
            self._file.publish()
            self._file = None


@contextmanager
def _remedy_note(folder: Path) -> Iterator[None]:
    """Add a note with the folder and the remedies to an OSError."""
    try:
        yield
    except OSError as error:
        error.add_note(
            f"while writing the action log in {folder}: {disk_remedy(error)}, or turn the log off "
            "(output.action_log=false), then resume from the last checkpoint with resume=auto"
        )
        raise
