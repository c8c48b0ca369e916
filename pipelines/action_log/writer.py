"""The action log: every sample that training received, with all that was drawn for it, written beside training.

`add` only keeps references; a thread makes rows of them and writes. `close_part`, called before a checkpoint is
published, makes sure that the log reaches as far as the checkpoint. What is not published when the process dies is
lost, and made again by the run that goes on from the checkpoint.
"""

import logging
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from iwm_fast.pipelines.action_log.files import LogFileWriter
from iwm_fast.pipelines.action_log.schema import BatchRecord, LogMetadata, RowBuilder, received
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.storage.shard_set import ShardSet

log = logging.getLogger(__name__)

# a row takes about 200 bytes in memory and 90 to 120 on disk: a group 3 MB, a part 100 MB
GROUP_ROWS = 16_384
PART_ROWS = 1_048_576

# groups that may wait for the disk before training does
_MOST_WAITING = 2


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
        part_rows: int = PART_ROWS,
    ) -> None:
        """Make the folder; after `iwm_fast.pipelines.action_log.files.truncate_from`, which no rank may be behind.

        Args:
            group_rows: rows that are made and written together.
            part_rows: rows after which a part is published at the next step, checkpoint or not.

        Raises:
            OSError: if the folder cannot be made.
        """
        self._folder, self._rank, self._maker = folder, rank, RowBuilder(head, shards, rank)
        self._group_rows, self._part_rows = group_rows, part_rows
        self._received: list[BatchRecord] = []
        self._num_received, self._num_in_part, self._last_step = 0, 0, -1
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="action-log")
        self._writing: deque[Future[None]] = deque()
        self.failure: Exception | None = None
        """What the thread ran into; everything behind it is lost."""
        # only the thread touches it
        self._part: LogFileWriter | None = None
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def add(self, batch: Batch) -> Batch:
        """Hand over a batch's rows; returns the batch, so that `map(log.add, loader)` is the loader with a log.

        Raises:
            OSError: if rows that were handed over before could not be written.
        """
        self._raise_failure()
        if self._num_in_part >= self._part_rows and batch.step != self._last_step:
            self._hand_over(ends_part=True)
        self._received.append(received(batch))
        self._last_step = batch.step
        self._num_received += len(batch.key)
        self._num_in_part += len(batch.key)
        if self._num_received >= self._group_rows:
            self._hand_over(ends_part=False)
        return batch

    def close_part(self) -> None:
        """Return when every row that was added is in a published file and on the disk.

        Raises:
            OSError: if that cannot be; no file is left half written.
        """
        self._hand_over(ends_part=True).result()
        self._raise_failure()

    def close(self) -> None:
        """Publish what was added since, as far as possible, and end the thread; raises nothing.

        It also runs where training failed, whose error is the one to be seen; and the last rows show on what it failed.
        """
        self._hand_over(ends_part=True)
        self._thread.shutdown()
        if self.failure is not None:
            log.warning("the action log in %s lacks its last rows: %s", self._folder, self.failure)

    def _hand_over(self, *, ends_part: bool) -> Future[None]:
        if len(self._writing) >= _MOST_WAITING:
            # a slow disk makes training wait; memory would end at some time
            self._writing.popleft().result()
        task = self._thread.submit(self._write, self._received, ends_part)
        self._writing.append(task)
        self._received, self._num_received = [], 0
        self._num_in_part = 0 if ends_part else self._num_in_part
        return task

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _write(self, batches: list[BatchRecord], ends_part: bool) -> None:
        """Write a group of rows and publish the part if it ends; on the thread."""
        if self.failure is not None:
            return
        try:
            with _explained(self._folder):
                self._write_group(batches, ends_part)
        # whatever it was, the training thread must hear of it
        except Exception as error:
            self.failure = error
            if self._part is not None:
                self._part.discard()

    def _write_group(self, batches: list[BatchRecord], ends_part: bool) -> None:
        if batches:
            self._part = self._part or LogFileWriter(self._folder, self._rank, self._maker.schema)
            self._part.write(self._maker.rows(batches))
        if ends_part and self._part is not None:
            self._part.publish()
            self._part = None


@contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        error.add_note(
            f"while writing the action log in {folder}; free space there, or do without it (output.action_log=false), "
            "then go on from the last checkpoint with resume=auto"
        )
        raise
