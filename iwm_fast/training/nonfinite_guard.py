"""Steps that were skipped because of a non-finite loss or gradient: they are recorded, and too many end the run.

`RUN/skipped_steps.jsonl` has one line per skipped step: the step, the number of consecutive skipped steps up to it, and
the suspected samples of each rank.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from iwm_fast.monitoring.metrics import drop_rows_after
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.error_reporting import PeerFailedError
from iwm_fast.runtime.json_lines import append_line
from iwm_fast.training.step_report import StepReport
from iwm_fast.training.train_state import TrainState

log = logging.getLogger(__name__)

FILE_NAME = "skipped_steps.jsonl"
_MAX_PRINTED_SAMPLES = 8
# Trained weights are far below, and a few layers with weights far above give tokens that are not finite.
MAX_WEIGHT = 1e4


def have_diverged(weights: Iterable[Tensor]) -> bool:
    """Return whether a weight is not finite or its magnitude is above MAX_WEIGHT. Waits for the device once."""
    # NaN is the maximum of all tensors that contain one.
    largest = torch.stack([weight.detach().abs().amax().float() for weight in weights if weight.numel()]).max()
    return not float(largest) <= MAX_WEIGHT


class NonfiniteGuard:
    """Counts consecutive skipped steps. Every rank has a guard and reports every step to it."""

    def __init__(
        self, folder: Path, rank_info: RankInfo, *, state: TrainState, max_skipped_steps: int, remedy: str
    ) -> None:
        """Watch a run from the step of `state` on; `remedy` says in the error message what the user can do."""
        self._folder: Path = folder
        self._rank_info: RankInfo = rank_info
        self._max_skipped_steps: int = max_skipped_steps
        self._remedy: str = remedy
        self._state: TrainState = state
        self._message = ""
        # A run that ended at the limit begins to count again when it is resumed.
        if self.limit_reached:
            state.skipped_in_a_row = 0
        if rank_info.rank == 0 and (folder / FILE_NAME).exists():
            drop_rows_after(folder / FILE_NAME, state.step)

    @property
    def limit_reached(self) -> bool:
        """Whether as many consecutive steps were skipped as are allowed."""
        return self._state.skipped_in_a_row >= self._max_skipped_steps

    def add(self, step: int, report: StepReport) -> None:
        """Record a step, counted from 1, in the training state and, if it was skipped, in the file.

        Collective if the step was skipped, on which all ranks agree.
        """
        if report.is_applied:
            self._state.skipped_in_a_row = 0
            return
        self._state.skipped_in_a_row += 1
        suspects = distributed.gather_objects(report.suspect_sample_keys())
        if self._rank_info.rank != 0:
            return
        rows = [{"rank": rank, "samples": samples} for rank, samples in enumerate(suspects) if samples]
        text = ", ".join(f"{row['rank']}: {' '.join(row['samples'][:_MAX_PRINTED_SAMPLES])}" for row in rows)
        self._message = (
            f"{self._state.skipped_in_a_row} steps in a row were not finite, the last one step {step}; suspected "
            f"samples by rank: {text} (all of them in {self._folder / FILE_NAME})"
        )
        log.warning("step %d skipped: a loss or gradient is not finite; suspected samples by rank: %s", step, text)
        row = {"step": step, "in_a_row": self._state.skipped_in_a_row, "suspects": rows}
        append_line(self._folder / FILE_NAME, row)

    def end_run(self, kept: str) -> NoReturn:
        """Raise the error that ends the run.

        Args:
            kept: which state of the run is saved.

        Raises:
            FloatingPointError: on rank 0, naming the suspected samples of all ranks.
            PeerFailedError: on the other ranks, so that only one message is printed.
        """
        if self._rank_info.rank != 0:
            raise PeerFailedError("rank 0 names the samples that are not finite")
        skipped = f"{self._message}; " if self._state.skipped_in_a_row else ""
        raise FloatingPointError(f"{skipped}{kept}; {self._remedy}")
