"""Shows the metrics of a run in TensorBoard."""

import os
import socket
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboard.summary.writer.record_writer import RecordWriter

from iwm_fast.pipelines.storage.atomic import name_disk_errors


class TensorBoardLogger:
    """An event file, written at once: torch's writer would report errors of the disk in a thread of its own."""

    def __init__(self, run_folder: Path, first_step: int) -> None:
        """Open a file in the run's folder; `first_step` is the step that the run resumes from.

        Raises:
            DiskError: if it cannot be written, as from `write`.
        """
        self._folder: Path = run_folder / "tensorboard"
        with name_disk_errors(self._folder):
            self._folder.mkdir(exist_ok=True)
            # TensorBoard sorts files by name, and looks for "tfevents".
            name = f"events.out.tfevents.{time.time_ns() // 1000}.{socket.gethostname()}.{os.getpid()}"
            self._file = (self._folder / name).open("wb")
        self._records = RecordWriter(self._file)
        self._add(Event(file_version="brain.Event:2"))
        # This hides rows after `first_step` of earlier files, which cannot be rewritten.
        self._add(Event(step=first_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write one row."""
        row = Summary(value=[Summary.Value(tag=name, simple_value=value) for name, value in values.items()])
        self._add(Event(step=step, summary=row))

    def _add(self, event: Event) -> None:
        event.wall_time = time.time()
        with name_disk_errors(self._folder):
            self._records.write(event.SerializeToString())
            self._file.flush()

    def close(self) -> None:
        """Close the file; all rows have been written."""
        self._file.close()
