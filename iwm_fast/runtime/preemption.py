"""Stopping in order: a signal or the launcher's death ends a run at its next step, with one checkpoint.

    RUN/status.json     running -> finished | preempted | failed

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

log = logging.getLogger("iwm_fast")

EXIT_PREEMPTED = 75
"""EX_TEMPFAIL of sysexits.h: start it again."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# launchers kill after 30 s, and a status is to be written before
GRACE_S = 25.0
_LOOK_EVERY_S = 1.0


class Preemption:
    """Whether this process has been told to stop; never, unless `listen` has been called."""

    def __init__(self) -> None:
        self.reason = ""
        """Why it has to stop; empty if it need not."""
        self.before_giving_up: Callable[[], None] = lambda: None
        """Called when time is over, before the process ends."""
        self._longest_step_s = 0.0
        self._asked, self._deadline = math.inf, math.inf
        self._is_saving = False
        self._parent: int | None = None

    def listen(self, *, has_launcher: bool) -> None:
        """From now on take notice of signals and, under a launcher, of its end; on the main thread, once."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        # the handler in C writes here at once, also while the main thread waits for other ranks
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        self._parent = os.getppid() if has_launcher else None
        Thread(target=self._watch, args=(read_end,), name="preemption", daemon=True).start()

    def _on_signal(self, number: int, _: object) -> None:
        # a second Ctrl-C means it
        if number == signal.SIGINT and self.reason and time.monotonic() > self._asked + _LOOK_EVERY_S:
            raise KeyboardInterrupt

    def _watch(self, read_end: int) -> None:
        while True:
            ready, _, _ = select.select([read_end], [], [], _LOOK_EVERY_S)
            # every signal that anyone in this process has a handler for comes here
            numbers = [number for number in os.read(read_end, 64) if number in SIGNALS] if ready else []
            if numbers:
                self._request(signal.Signals(numbers[0]).name)
            self.has_lost_launcher()
            if time.monotonic() > self._deadline and not self._is_saving:
                self._give_up()

    def has_lost_launcher(self) -> bool:
        """Return whether the launcher is gone, which is taken notice of at once."""
        is_gone = self._parent is not None and os.getppid() != self._parent
        if is_gone:
            self._request("the launcher ended")
        return is_gone

    def _request(self, reason: str) -> None:
        if not self.reason:
            self._asked = time.monotonic()
            self._deadline = self._asked + GRACE_S + self._longest_step_s
            self.reason = reason
            log.warning("%s: stopping behind this step", reason)

    def note_step(self, step_s: float) -> None:
        """Take notice of how long a step takes: so much longer a stop may take."""
        self._longest_step_s = max(self._longest_step_s, step_s)

    def save_in_peace(self) -> None:
        """Wait for as long as a checkpoint takes: every rank has stopped, and only the disk is to be waited for."""
        self._is_saving = True

    def _give_up(self) -> NoReturn:
        waited = time.monotonic() - self._asked
        print(f"{self.reason}: no end of the step after {waited:.0f} s, leaving without a checkpoint", file=sys.stderr)
        try:
            self.before_giving_up()
        finally:
            os._exit(EXIT_PREEMPTED)


class PreemptedError(Exception):
    """A run was told to stop, and has."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(f"{reason}: stopped behind step {step}")


OF_PROCESS = Preemption()
"""Signals are a process's own, so there is one of these."""
