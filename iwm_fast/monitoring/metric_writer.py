"""Writes the metrics of a run: `metrics.jsonl` is the authoritative record, TensorBoard shows the same values."""

import json
import logging
import math
import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from iwm_fast.monitoring.metrics import METRICS_FILE, drop_rows_after
from iwm_fast.pipelines.storage.atomic import name_disk_errors

log = logging.getLogger(__name__)


class MetricWriter:
    """Appends one row of metrics per log step."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open the files in `folder`, and drop rows after `first_step`, the step that the run resumes from.

        Raises:
            DiskError: if a file cannot be written, as from the other methods.
        """
        self._path: Path = folder / METRICS_FILE
        drop_rows_after(self._path, first_step)
        self._board = _TensorBoardFile(folder / "tensorboard", first_step)
        with name_disk_errors(self._path):
            self._file = self._path.open("a", encoding="utf-8")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one row; `step` is the number of completed steps."""
        # The gradient norm of a skipped step is infinite or NaN, which JSON cannot represent.
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        with name_disk_errors(self._path):
            self._file.write(json.dumps({"step": step, **row}) + "\n")
            # Flushed, so that a crash loses no row and users can follow the file.
            self._file.flush()
        self._board.write(step, values)

    def force_to_disk(self) -> None:
        """Return once all rows are on the disk: a checkpoint must not be newer than its rows, even if power fails."""
        with name_disk_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close both files; all rows have been written."""
        # After an error, the file may still hold a row that it cannot write.
        for file in (self._file, self._board):
            try:
                file.close()
            except OSError as error:
                log.debug("%s", error)


class _TensorBoardFile:
    """An event file, written at once: torch's writer would report errors of the disk in a thread of its own."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._folder: Path = folder
        with name_disk_errors(folder):
            folder.mkdir(exist_ok=True)
            # TensorBoard sorts files by name, and looks for "tfevents".
            name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
            self._file = (folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._add(Event(file_version="brain.Event:2"))
        # This hides rows after `first_step` of earlier files, which cannot be rewritten.
        self._add(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, float]) -> None:
        row = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._add(Event(step=step, summary=row))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        with name_disk_errors(self._folder):
            self._records.write(event.SerializeToString())
            self._file.flush()

    def close(self) -> None:
        self._file.close()
