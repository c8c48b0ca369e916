"""Steps that were skipped because of a non-finite loss or gradient: they are recorded, and too many end the run.

`RUN/skipped_steps.jsonl` has one line per skipped step: the step, the number of consecutive skipped steps up to it, and
the suspected samples of each rank.
"""

import logging
from pathlib import Path

from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.error_reporting import PeerFailedError
from iwm_fast.runtime.json_lines import append_line
from iwm_fast.training.step import StepReport

log = logging.getLogger(__name__)

FILE_NAME = "skipped_steps.jsonl"
_MAX_PRINTED_SAMPLES = 8


class NonfiniteGuard:
    """Counts consecutive skipped steps. Every rank has a guard and reports every step to it."""

    def __init__(self, folder: Path, rank_info: RankInfo, *, max_skipped_steps: int, remedy: str) -> None:
        """Watch a run; `remedy` says in the error message what the user can do."""
        self._folder: Path = folder
        self._rank_info: RankInfo = rank_info
        self._max_skipped_steps: int = max_skipped_steps
        self._remedy: str = remedy
        self._num_consecutive = 0
        self._message = ""

    @property
    def limit_reached(self) -> bool:
        """Whether as many consecutive steps were skipped as are allowed."""
        return self._num_consecutive >= self._max_skipped_steps

    def add(self, step: int, report: StepReport) -> None:
        """Record a step, counted from 1.

        Collective if the step was skipped, on which all ranks agree.
        """
        if report.is_applied:
            self._num_consecutive = 0
            return
        self._num_consecutive += 1
        suspects = distributed.gather_objects(report.suspect_sample_keys())
        if self._rank_info.rank != 0:
            return
        rows = [{"rank": rank, "samples": samples} for rank, samples in enumerate(suspects) if samples]
        text = ", ".join(f"{row['rank']}: {' '.join(row['samples'][:_MAX_PRINTED_SAMPLES])}" for row in rows)
        self._message = (
            f"{self._num_consecutive} steps in a row were not finite, the last one step {step}; suspected samples by "
            f"rank: {text} (all of them in {self._folder / FILE_NAME}); {self._remedy}"
        )
        log.warning("step %d skipped: a loss or gradient is not finite; suspected samples by rank: %s", step, text)
        row = {"step": step, "in_a_row": self._num_consecutive, "suspects": rows}
        append_line(self._folder / FILE_NAME, row)

    def end_run(self) -> None:
        """Raise the error that ends the run, once the limit is reached.

        Raises:
            FloatingPointError: on rank 0, naming the suspected samples of all ranks.
            PeerFailedError: on the other ranks, so that only one message is printed.
        """
        if self._rank_info.rank != 0:
            raise PeerFailedError("rank 0 names the samples that are not finite")
        raise FloatingPointError(self._message)
