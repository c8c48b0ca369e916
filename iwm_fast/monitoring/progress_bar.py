"""How a run looks while it goes on: one line that moves on a terminal, a line for each log row elsewhere."""

import logging
import math
import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from iwm_fast.monitoring.collapse import collapse_warnings
from iwm_fast.runtime.distributed import RankInfo

log = logging.getLogger(__name__)

# time left follows from the steps of so many seconds: short enough to follow, long enough to hold a checkpoint
_SPEED_PERIOD_S = 600.0
# a thread draws the line, and training wants the interpreter
_DRAWN_PER_S = 2
_OVER_THE_LINE = "\r\x1b[2K"


def open_display(rank_info: RankInfo, step: int, total_steps: int) -> "Lines | LiveDisplay":
    """Return what fits where standard error goes; `step` steps are done."""
    console = Console(stderr=True)
    if not (sys.stderr.isatty() and console.is_interactive and not console.is_dumb_terminal):
        return Lines(total_steps)
    if rank_info.rank == 0:
        return LiveDisplay(console, step, total_steps)
    # rank 0's line may stand on the same terminal
    for handler in _handlers_on_standard_error():
        handler.setFormatter(logging.Formatter(f"{_OVER_THE_LINE}[rank {rank_info.rank}] %(message)s"))
    return Lines(total_steps)


class Lines:
    """A line for each log row, as logs want it."""

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps

    def advance(self, step: int) -> None:
        """Say that so many steps are done."""

    def show(self, step: int, values: dict[str, float], *, loss: float) -> None:
        """Show a log row, and a warning for each monitor that crossed its threshold."""
        left_s = math.ceil((self._total_steps - step) * values["speed/step_s"])
        log.info("step %d/%d  %s  left %d:%02d", step, self._total_steps, _words(values, loss), *divmod(left_s, 60))
        _warn(step, values)

    def close(self) -> None:
        """Leave the terminal as it was."""


class LiveDisplay:
    """One line at the foot of a terminal; what is logged or printed meanwhile goes above it; see `Lines`."""

    def __init__(self, console: Console, step: int, total_steps: int) -> None:
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=_DRAWN_PER_S,
            speed_estimate_period=_SPEED_PERIOD_S,
            expand=True,
        )
        self._task = self._progress.add_task("", total=total_steps, completed=step)
        self._switched = _handlers_on_standard_error()
        self._standard_error = sys.stderr
        self._progress.start()
        # from now on that is a stream which knows of the line
        for handler in self._switched:
            handler.setStream(sys.stderr)

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def show(self, step: int, values: dict[str, float], *, loss: float) -> None:
        self._progress.update(self._task, description=_words(values, loss))
        _warn(step, values)

    def close(self) -> None:
        self._progress.stop()
        for handler in self._switched:
            handler.setStream(self._standard_error)


def _handlers_on_standard_error() -> list[logging.StreamHandler]:
    handlers = [handler for handler in logging.getLogger().handlers if isinstance(handler, logging.StreamHandler)]
    return [handler for handler in handlers if handler.stream is sys.stderr]


def _words(values: dict[str, float], loss: float) -> str:
    return (
        f"loss {loss:.4f}  {values['speed/images_per_s']:.0f} images/s  waiting {100 * values['data/wait_share']:.1f} %"
    )


def _warn(step: int, values: dict[str, float]) -> None:
    for sentence in collapse_warnings(values):
        log.warning("step %d: %s", step, sentence)
