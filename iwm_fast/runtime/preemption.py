"""Stopping in order: a signal or the launcher's death ends a run at its next step, with one checkpoint.

A rank that is told to stop tells the others at the end of the step; all save together and end with code 75. Whatever
keeps them from getting there (a shard that does not answer, a rank that is gone) has 25 s and the time of one step:
then the process ends all the same, and the last checkpoint stands. Once there, saving has all the time it needs.
"""

import logging
import math
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from threading import Thread
from typing import NoReturn

log = logging.getLogger(__name__)

EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: start it again."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# launchers kill after 30 s, and a status is to be written before
GRACE_S = 25.0
_LOOK_EVERY_S = 1.0


class Preemption:
    """Whether this process has been told to stop; never, unless `install_handlers` has been called."""

    def __init__(self) -> None:
        self.reason = ""
        """Why it has to stop; empty if it need not."""
        self.on_timeout: Callable[[], None] = lambda: None
        """Called when the grace period is over, before the process ends without a checkpoint."""
        self._longest_step_s = 0.0
        self._requested_at, self._deadline = math.inf, math.inf
        self.is_deadline_suspended = False
        """Whether the process may take as long as it needs: only the final checkpoint is still to be written."""
        self._parent: int | None = None

    def install_handlers(self, *, watch_parent: bool) -> None:
        """Watch for signals from now on and, under a launcher, for its end; call it once, on the main thread."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        # the handler in C writes here at once, also while the main thread waits for other ranks
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        self._parent = os.getppid() if watch_parent else None
        Thread(target=self._watch, args=(read_end,), name="preemption", daemon=True).start()

    def _on_signal(self, number: int, _: object) -> None:
        # The first Ctrl-C asks for a clean stop. A second one, at least a second later, aborts immediately.
        if number == signal.SIGINT and self.reason and time.monotonic() > self._requested_at + _LOOK_EVERY_S:
            raise KeyboardInterrupt

    def _watch(self, read_end: int) -> None:
        while True:
            ready, _, _ = select.select([read_end], [], [], _LOOK_EVERY_S)
            # every signal that anyone in this process has a handler for comes here
            numbers = [number for number in os.read(read_end, 64) if number in SIGNALS] if ready else []
            if numbers:
                self._request_stop(signal.Signals(numbers[0]).name)
            self.launcher_exited()
            if time.monotonic() > self._deadline and not self.is_deadline_suspended:
                self._exit_without_checkpoint()

    def launcher_exited(self) -> bool:
        """Return whether the launcher has ended; if so, a stop is requested."""
        is_gone = self._parent is not None and os.getppid() != self._parent
        if is_gone:
            self._request_stop("the launcher ended")
        return is_gone

    def _request_stop(self, reason: str) -> None:
        if not self.reason:
            self._requested_at = time.monotonic()
            self._deadline = self._requested_at + GRACE_S + self._longest_step_s
            self.reason = reason
            log.warning("%s: stopping after this step", reason)

    def record_step_duration(self, step_s: float) -> None:
        """Note how long a step took: a stop may take as much longer than the grace period."""
        self._longest_step_s = max(self._longest_step_s, step_s)

    def suspend_deadline(self) -> None:
        """Let the final checkpoint take as long as it needs: all ranks have stopped, only the disk is waited for."""
        self.is_deadline_suspended = True

    def _exit_without_checkpoint(self) -> NoReturn:
        waited = time.monotonic() - self._requested_at
        print(f"{self.reason}: no end of the step after {waited:.0f} s, leaving without a checkpoint", file=sys.stderr)
        try:
            self.on_timeout()
        finally:
            os._exit(EXIT_PREEMPTED)


class PreemptedError(Exception):
    """A run was told to stop, and has."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(f"{reason}: stopped after step {step}")
