"""A trace of some steps of rank 0, as `runtime.profile` asks for it; nothing at all otherwise."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from iwm_fast.config.run import parse_step_range
from iwm_fast.runtime.distributed import RankInfo

log = logging.getLogger(__name__)

_NUM_OPERATIONS = 25


class StepProfiler:
    """Is told which step comes next, and traces those that were asked for."""

    def __init__(self, setting: str, folder: Path, rank_info: RankInfo) -> None:
        """Get ready to write into `folder`; ranks above 0 never trace."""
        self._setting, self._folder, self._device = setting, folder, rank_info.device
        self._steps = (parse_step_range(setting) or range(0)) if rank_info.rank == 0 else range(0)
        self._trace: profile | None = None
        self._begun_at: int | None = None

    def reach(self, step: int) -> None:
        """Begin or end the trace where it is due; `step` is about to run."""
        if step in self._steps and self._begun_at is None:
            self._begin(step)
        elif self._trace is not None and step not in self._steps:
            self._write(step)

    def close(self, step: int) -> None:
        """Write what there is at the end of a run; `step` would have come next."""
        if self._trace is not None:
            self._write(step)
        elif self._steps and self._begun_at is None:
            log.warning(
                "runtime.profile=%s: no trace, none of these steps came; the run ended before step %d",
                self._setting,
                step,
            )

    def _begin(self, step: int) -> None:
        on_gpu = [ProfilerActivity.CUDA] if self._device.type == "cuda" else []
        self._trace = profile(activities=[ProfilerActivity.CPU, *on_gpu], record_shapes=True)
        self._begun_at = step
        self._trace.start()

    def _write(self, step: int) -> None:
        trace, self._trace = self._trace, None
        assert trace is not None
        if self._device.type == "cuda":
            # what the last step started belongs to it
            torch.cuda.synchronize(self._device)
        trace.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"steps-{self._begun_at}-{step}.json"
        trace.export_chrome_trace(str(path))
        by = f"self_{'cuda' if self._device.type == 'cuda' else 'cpu'}_time_total"
        table = trace.key_averages().table(sort_by=by, row_limit=_NUM_OPERATIONS)
        path.with_suffix(".txt").write_text(table, encoding="utf-8")
        log.info("profile of steps %s:%d: %s, for Perfetto or chrome://tracing; dearest operations: %s",
                 self._begun_at, step, path, path.with_suffix(".txt"))  # fmt: skip
        if step in self._steps:
            log.warning("runtime.profile=%s: the run ended before step %d, the trace holds what there was",
                        self._setting, step)  # fmt: skip
