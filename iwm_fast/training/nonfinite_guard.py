"""Steps that were left out because a loss or gradient was not finite: counted, written down, and not for ever.

`RUN/skipped_steps.jsonl` has a row for each: step, how many in a row, and by rank the samples that are suspected.
"""

import json
import logging
from pathlib import Path

from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.error_reporting import PeerFailedError
from iwm_fast.training.step import StepReport

log = logging.getLogger(__name__)

FILE = "skipped_steps.jsonl"
_MOST_SHOWN = 8


class NonfiniteGuard:
    """Counts the skipped steps in a row; every rank has one and is told of each step."""

    def __init__(self, folder: Path, rank_info: RankInfo, *, most: int, remedy: str) -> None:
        self._folder = folder
        self._rank_info = rank_info
        self._most = most
        self._remedy = remedy
        self._in_a_row = 0
        self._message = ""

    @property
    def limit_reached(self) -> bool:
        """Whether as many were skipped in a row as there may be."""
        return self._in_a_row >= self._most

    def add(self, step: int, report: StepReport) -> None:
        """Take notice of a step, the `step`-th from 1; collective if it was skipped, which all ranks know alike."""
        if report.is_applied:
            self._in_a_row = 0
            return
        self._in_a_row += 1
        suspects = distributed.gather_objects(report.suspect_sample_keys())
        if self._rank_info.rank != 0:
            return
        rows = [{"rank": rank, "samples": samples} for rank, samples in enumerate(suspects) if samples]
        shown = ", ".join(f"{row['rank']}: {' '.join(row['samples'][:_MOST_SHOWN])}" for row in rows)
        self._message = (
            f"{self._in_a_row} steps in a row were not finite, the last one step {step}; suspected samples by rank: "
            f"{shown} (all in {self._folder / FILE}); {self._remedy}"
        )
        log.warning("step %d skipped, a loss or gradient was not finite; samples by rank: %s", step, shown)
        with (self._folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "in_a_row": self._in_a_row, "suspects": rows}) + "\n")

    def end_run(self) -> None:
        """End a run that is hopeless, with one message.

        Raises:
            FloatingPointError: on rank 0, naming the samples of every rank.
            PeerFailedError: on the other ranks.
        """
        if self._rank_info.rank != 0:
            raise PeerFailedError("rank 0 names the samples that are not finite")
        raise FloatingPointError(self._message)
