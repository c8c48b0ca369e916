"""Stopping cleanly: a signal, or the end of the launcher, ends a run after its current step, with a checkpoint.

A rank that receives a signal tells the others at the end of the step. All ranks save together and exit with code 75.
A signal that was ignored when the process started stays ignored, such as SIGHUP under nohup. A second Ctrl-C ends the
process at once, without a checkpoint.

A rank may be unable to reach the end of its step: a shard does not answer, or another rank is gone. It has 25 s plus
the duration of one step. Then the process exits without a new checkpoint, and the previous one remains. The status says
so after 25 s already, in case the launcher kills the process. Once all ranks have reached the end of the step, saving
may take as long as it needs.
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
"""EX_TEMPFAIL of sysexits.h: a temporary failure, so that starting the same command again resumes the run."""

EXIT_ABORTED = 128 + signal.SIGINT
"""What a shell reports of a program that Ctrl-C has ended."""

# SIGTERM is what launchers and schedulers send, SIGINT is Ctrl-C, SIGHUP the end of the terminal or of an ssh session.
# Schedulers announce a time limit with one of the others: SLURM's --signal=USR1, Grid Engine's SIGUSR2 and SIGXCPU.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
# Launchers kill their processes 30 s after SIGTERM, and the status must be written before that.
GRACE_PERIOD_S = 25.0
_POLL_INTERVAL_S = 1.0
# A launcher passes on the Ctrl-C that the terminal has sent to its ranks, too. This is not the user's second one.
_SECOND_CTRL_C_S = 2.0


class Preemption:
    """Whether this process has been asked to stop; it never is unless `install_handlers` has been called."""

    def __init__(self) -> None:
        self.reason: str = ""
        """Why the process must stop: the name of a signal, or that the launcher ended. Empty if it need not stop."""
        self.on_timeout: Callable[[], None] = lambda: None
        """Called when the grace period is over, and again before the process exits without a checkpoint."""
        self.is_deadline_suspended: bool = False
        """Whether the process may take as long as it needs, because only the final checkpoint remains to be written."""
        self._longest_step_s: float = 0.0
        # Times on the monotonic clock, infinite until there is a Ctrl-C and until a stop is requested.
        self._interrupted_at: float = math.inf
        self._requested_at: float = math.inf
        self._deadline: float = math.inf
        self._is_overdue = False
        # None if there is no launcher to watch.
        self._launcher_pid: int | None = None

    def install_handlers(self, *, watch_parent: bool) -> None:
        """Start to watch for signals and, under a launcher, for the launcher's end.

        Call it once, on the main thread: Python installs signal handlers nowhere else.
        """
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        # Python runs its signal handlers on the main thread between bytecodes, so never while that thread waits in a
        # collective. The C handler writes the signal's number to this pipe immediately, where the thread reads it.
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
        # First, because the launcher may end at any moment.
        self._launcher_pid = os.getppid() if watch_parent else None
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        Thread(target=self._watch, args=(read_end,), name="preemption", daemon=True).start()

    def _on_signal(self, number: int, _: object) -> None:
        """Do nothing: the watching thread learns of the signal from the pipe."""

    def _watch(self, read_end: int) -> None:
        while True:
            ready, _, _ = select.select([read_end], [], [], _POLL_INTERVAL_S)
            # The pipe receives every signal that has a Python handler, including handlers that libraries installed.
            received = os.read(read_end, 64) if ready else b""
            numbers = [number for number in received if signal.getsignal(number) == self._on_signal]
            if signal.SIGINT in numbers:
                self._count_ctrl_c()
            if numbers:
                self._request_stop(signal.Signals(numbers[0]).name)
            self.launcher_exited()
            self._report_when_overdue()
            if time.monotonic() > self._deadline and not self.is_deadline_suspended:
                waited_s = time.monotonic() - self._requested_at
                self._exit_without_checkpoint(f"the step has not ended after {waited_s:.0f} s", EXIT_PREEMPTED)

    def _report_when_overdue(self) -> None:
        """Call `on_timeout` once when the grace period is over, because a launcher may kill this process soon.

        The step may end later nevertheless. Then the main thread replaces the status that was written here.
        """
        if self._is_overdue or self.is_deadline_suspended or time.monotonic() < self._requested_at + GRACE_PERIOD_S:
            return
        self._is_overdue = True
        try:
            self.on_timeout()
        # Not raised: this thread still has to end the process at the deadline.
        except OSError as error:
            log.warning("%s", error)

    def _count_ctrl_c(self) -> None:
        self._interrupted_at = min(self._interrupted_at, time.monotonic())
        if time.monotonic() > self._interrupted_at + _SECOND_CTRL_C_S:
            self._exit_without_checkpoint("interrupted again", EXIT_ABORTED)

    def launcher_exited(self) -> bool:
        """Return whether the launcher has ended; if it has, request a stop."""
        # The kernel gives an orphaned process a new parent.
        has_exited = self._launcher_pid is not None and os.getppid() != self._launcher_pid
        if has_exited:
            self._request_stop("the launcher ended")
        return has_exited

    def _request_stop(self, reason: str) -> None:
        if not self.reason:
            self._requested_at = time.monotonic()
            self._deadline = self._requested_at + GRACE_PERIOD_S + self._longest_step_s
            # Set last: the main thread reads the other two only once there is a reason.
            self.reason = reason
            hint = "; Ctrl-C again aborts without a checkpoint" if reason == "SIGINT" else ""
            log.warning("%s: stopping after this step%s", reason, hint)

    def record_step_duration(self, step_s: float) -> None:
        """Record how long a step took; the longest one extends the grace period of a later stop."""
        self._longest_step_s = max(self._longest_step_s, step_s)

    def suspend_deadline(self) -> None:
        """Let the final checkpoint take as long as it needs; call it when all ranks have stopped and only save."""
        self.is_deadline_suspended = True

    def _exit_without_checkpoint(self, cause: str, code: int) -> NoReturn:
        try:
            self.on_timeout()
            print(f"{self.reason}: {cause}, leaving without a checkpoint", file=sys.stderr)
        finally:
            # The main thread may hang, so the interpreter could not end in the normal way.
            os._exit(code)


class PreemptedError(Exception):
    """A run was asked to stop and has stopped after a step."""

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(f"{reason}: stopped after step {step}")
