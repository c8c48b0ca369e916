"""Profiles the steps of rank 0 that `runtime.profile` selects."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from iwm_fast.config.run import parse_step_range
from iwm_fast.pipelines.storage.atomic import replace_file
from iwm_fast.runtime.distributed import RankInfo

log = logging.getLogger(__name__)

# Rows of the table of operations.
_NUM_OPERATIONS = 25


class StepProfiler:
    """Traces the selected steps, and writes the trace and a table of the most expensive operations."""

    def __init__(self, setting: str, folder: Path, rank_info: RankInfo) -> None:
        """Prepare to write into `folder`. Ranks other than 0 never trace."""
        self._setting: str = setting
        self._folder: Path = folder
        self._device: torch.device = rank_info.device
        self._steps = (parse_step_range(setting) or range(0)) if rank_info.rank == 0 else range(0)
        self._trace: profile | None = None
        self._first_step: int | None = None

    def before_step(self, step: int) -> None:
        """Start or stop the trace if it is due before `step`."""
        if step in self._steps and self._first_step is None:
            self._begin(step)
        elif self._trace is not None and step not in self._steps:
            self._write(step)

    def close(self, step: int) -> None:
        """Write an unfinished trace at the end of a run; `step` is the step that would have been next."""
        if self._trace is not None:
            self._write(step)
        elif self._steps and self._first_step is None:
            log.warning("runtime.profile=%s: no trace, because none of these steps was run before the end at step %d",
                        self._setting, step)  # fmt: skip

    def _begin(self, step: int) -> None:
        on_gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        self._trace = profile(activities=[ProfilerActivity.CPU, *on_gpu], record_shapes=True)
        self._first_step = step
        self._trace.start()

    def _write(self, step: int) -> None:
        trace, self._trace = self._trace, None
        assert trace is not None
        if self._device.type == "cuda":
            # Kernels that the last step launched are part of it.
            torch.cuda.synchronize(self._device)
        trace.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._first_step}-{step}.json"
        trace.export_chrome_trace(str(path))
        sort_key = f"self_{'cuda' if self._device.type == 'cuda' else 'cpu'}_time_total"
        table = trace.key_averages().table(sort_by=sort_key, row_limit=_NUM_OPERATIONS)
        replace_file(path.with_suffix(".txt"), lambda draft: draft.write_text(table, encoding="utf-8"))
        log.info("profile of steps %s:%d: %s, for Perfetto or chrome://tracing; most expensive operations: %s",
                 self._first_step, step, path, path.with_suffix(".txt"))  # fmt: skip
        if step in self._steps:
            log.warning("runtime.profile=%s: the run ended before step %d, so the trace is incomplete",
                        self._setting, step)  # fmt: skip
