"""Writes the metrics of a run: `metrics.jsonl` is the authoritative record, loggers show the same values."""

import json
import logging
import math
import os
from collections.abc import Collection
from pathlib import Path
from typing import Protocol, runtime_checkable

from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.metrics import METRICS_FILE, drop_rows_after
from iwm_fast.pipelines.storage.atomic import name_disk_errors
from iwm_fast.runtime.extras import require_packages

log = logging.getLogger(__name__)


@runtime_checkable
class MetricLogger(Protocol):
    """Shows the metrics of a run somewhere. Only rank 0 has loggers."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """Take one row, without waiting; `step` is the number of completed steps. Values may be infinite or NaN."""
        ...

    def close(self) -> None:
        """End, also after an error."""
        ...


def require_logins(names: Collection[str]) -> None:
    """Check that the loggers have what they need to log in, before a run starts.

    Raises:
        ValueError: with the remedy, if something is missing.
        MissingPackageError: if a package is not installed.
    """
    if "wandb" in names:
        require_packages(["wandb"])
        from iwm_fast.monitoring.loggers.wandb_logger import require_login  # noqa: PLC0415

        require_login()


def open_loggers(config: RunConfig, run_id: str, first_step: int) -> list[MetricLogger]:
    """Open the loggers that `output.loggers` names.

    Args:
        config: settings of the run.
        run_id: name of the run, which stays the same however often it is resumed.
        first_step: step that the run resumes from; later rows of earlier starts are repeated.

    Raises:
        DiskError: if a file cannot be written.
    """
    folder, loggers = Path(config.output.folder), []
    # Imported where they are chosen, because each needs a package of an extra.
    for name in config.output.loggers:
        if name == "tensorboard":
            from iwm_fast.monitoring.loggers.tensorboard_logger import TensorBoardLogger  # noqa: PLC0415

            loggers.append(TensorBoardLogger(folder, first_step))
        if name == "wandb":
            from iwm_fast.monitoring.loggers.wandb_logger import WandbLogger  # noqa: PLC0415

            loggers.append(WandbLogger(config, run_id))
    return loggers


class MetricWriter:
    """Appends one row of metrics per log step."""

    def __init__(self, folder: Path, first_step: int) -> None:
        """Open the file in `folder`, and drop rows after `first_step`, the step that the run resumes from.

        Raises:
            DiskError: if the file cannot be written, as from the other methods.
        """
        self._path: Path = folder / METRICS_FILE
        self.loggers: list[MetricLogger] = []
        """What else receives the rows; closed with the file."""
        drop_rows_after(self._path, first_step)
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
        for logger in self.loggers:
            logger.write(step, values)

    def force_to_disk(self) -> None:
        """Return once all rows are on the disk: a checkpoint must not be newer than its rows, even if power fails."""
        with name_disk_errors(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and the loggers; all rows have been written."""
        # After an error, the file may still hold a row that it cannot write.
        for file in (self._file, *self.loggers):
            try:
                file.close()
            except OSError as error:
                log.debug("%s", error)
