"""Display of a running training: a progress bar on a terminal, a line for each log row elsewhere."""

import logging
import math
import sys
from contextlib import suppress

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from iwm_fast.monitoring.collapse import collapse_warnings
from iwm_fast.monitoring.throughput import format_rate
from iwm_fast.runtime.distributed import RankInfo

log = logging.getLogger(__name__)

# The remaining time is estimated from this many past seconds: few enough to follow changes of speed, and enough to
# include the time of a checkpoint.
_SPEED_PERIOD_S = 600.0
# Rare, because the thread that draws the bar competes with training for the interpreter lock.
_REDRAWS_PER_S = 2
# Metrics of evaluations, as labels and numbers of decimals.
_EVALUATION = {
    "mrr": ("MRR", 3), "knn": ("k-NN", 3), "linear": ("linear", 3), "attentive": ("attentive", 3),
    "rank_me": ("RankMe", 1), "lidar": ("LiDAR", 1),
}  # fmt: skip
# Moves to the beginning of the line and erases it.
_ERASE_LINE = "\r\x1b[2K"


def open_display(rank_info: RankInfo, step: int, total_steps: int) -> "PlainDisplay | LiveDisplay":
    """Return the display that suits standard error; `step` is the number of completed steps."""
    console = Console(stderr=True)
    if not (sys.stderr.isatty() and console.is_interactive and not console.is_dumb_terminal):
        return PlainDisplay(total_steps)
    if rank_info.rank == 0:
        return LiveDisplay(console, step, total_steps)
    # Rank 0 may draw its bar on the same terminal. A message of this rank must replace it, not overwrite half of it.
    for handler in _handlers_on_standard_error():
        handler.setFormatter(logging.Formatter(f"{_ERASE_LINE}[rank {rank_info.rank}] %(message)s"))
    return PlainDisplay(total_steps)


class PlainDisplay:
    """Writes a line for each log row, for log files and simple terminals."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps: int = total_steps

    def advance(self, step: int) -> None:
        """Report the number of completed steps; does nothing here, because only log rows are shown."""

    def show(self, step: int, values: dict[str, float], *, loss: float) -> None:
        """Show a log row, and a warning for each collapse monitor outside its range."""
        remaining_s = math.ceil((self._total_steps - step) * values["speed/step_s"])
        remaining = divmod(remaining_s, 60)
        log.info("step %d/%d  %s  left %d:%02d", step, self._total_steps, _summary(values, loss), *remaining)
        _log_evaluation(step, values)
        _log_warnings(step, values)

    def close(self) -> None:
        """Restore the terminal."""


class LiveDisplay:
    """Draws a progress bar in the last line of a terminal; log messages and printed text appear above it.

    It has the methods of `PlainDisplay`.
    """

    def __init__(self, console: Console, step: int, total_steps: int) -> None:
        """Draw the bar; `step` is the number of completed steps."""
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=_REDRAWS_PER_S,
            speed_estimate_period=_SPEED_PERIOD_S,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=step)
        self._handlers = _handlers_on_standard_error()
        self._standard_error = sys.stderr
        self._progress.start()
        # rich has replaced sys.stderr by a stream that prints above the bar. Handlers still hold the original one.
        for handler in self._handlers:
            handler.setStream(sys.stderr)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def show(self, step: int, values: dict[str, float], *, loss: float) -> None:
        self._progress.update(self._task, description=_summary(values, loss))
        _log_evaluation(step, values)
        _log_warnings(step, values)

    def close(self) -> None:
        # The terminal may be gone, which is what stops the run.
        with suppress(OSError):
            self._progress.stop()
        for handler in self._handlers:
            handler.setStream(self._standard_error)


def _handlers_on_standard_error() -> list[logging.StreamHandler]:
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.StreamHandler)]
    return [handler for handler in handlers if handler.stream is sys.stderr]


def _summary(values: dict[str, float], loss: float) -> str:
    rate = format_rate(values["speed/images_per_s"])
    return f"loss {loss:.4f}  {rate} images/s  waiting {100 * values['data/wait_share']:.1f} %"


def _log_evaluation(step: int, values: dict[str, float]) -> None:
    """Log the results of an evaluation as one line, if the log row has any."""
    results = []
    for name, (label, digits) in _EVALUATION.items():
        if f"eval/{name}" in values:
            value, untrained, chance = (values.get(f"eval/{name}{ending}") for ending in ("", "_untrained", "_chance"))
            controls = f"untrained {untrained:.{digits}f}" + (f", chance {chance:.3f}" if chance is not None else "")
            results.append(f"{label} {value:.{digits}f} ({controls})")
    if results:
        time_s, share = values["eval/time_s"], 100 * values["eval/time_share"]
        log.info("step %d: evaluation in %.1f s, %.1f %% of the time: %s", step, time_s, share, ", ".join(results))


def _log_warnings(step: int, values: dict[str, float]) -> None:
    for warning in collapse_warnings(values):
        log.warning("step %d: %s", step, warning)
