"""Errors as the user sees them: one message without a traceback, and an exit code that is not 0."""

import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

_SHARED = "found_by_every_rank"
_OWN_PACKAGES = ("iwm_fast",)

# what gloo, NCCL and torch's store say of a process that is gone
_LOST = re.compile(
    r"(connection (was likely )?(closed|reset)|broken pipe|remote process exited|timed out waiting).*?(?=\. |$)",
    re.IGNORECASE | re.MULTILINE,
)
# launchers look once a second
_GRACE_S = 2.0


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """End the process with a message if our own code or the file system refused something; let other errors pass.

    What our code raises is written for the user; what a library raises is a defect and keeps its traceback. Set
    IWM_TRACEBACK=1 to see the traceback of both. A rank that finds another one gone says so in one line.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("IWM_TRACEBACK") == "1":
            raise
        lost = lost_rank(error)
        if lost:
            _print_lost(lost)
            _wait_to_be_ended()
            raise SystemExit(1) from None
        if not _is_for_the_user(error):
            raise
        is_repeated = getattr(error, _SHARED, False) and os.environ.get("RANK", "0") != "0"
        if not is_repeated:
            _print(error)
        raise SystemExit(2) from None


@contextmanager
def found_by_every_rank() -> Iterator[None]:
    """Mark faults of the settings, which each rank of a launch finds alike: rank 0's message is enough.

    Only for code that reads the same on every rank. What one rank alone runs into must be heard from that rank.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        setattr(error, _SHARED, True)
        raise


def be_the_process(act: Callable[[], None]) -> NoReturn:
    """Do what this process is for, and leave it with the exit code of that."""
    code = 0
    try:
        act()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    end_process(code)


def end_process(code: int = 0) -> NoReturn:
    """Leave now, with a code: all is done and written.

    Threads that gloo and DeepSpeed leave behind abort the interpreter's own end about once in a hundred runs
    ("terminate called without an active exception"), and a finished run would count as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_for_the_user(error: Exception) -> bool:
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _OWN_PACKAGES:
        return True
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    is_ours = innermost.f_globals.get("__name__", "").split(".")[0] in (*_OWN_PACKAGES, "__main__")
    return is_ours and isinstance(error, ValueError | RuntimeError | ArithmeticError)


def lost_rank(error: Exception) -> str:
    """Return what a collective says of a rank that is gone, empty if the error is another one."""
    found = _LOST.search(str(error)) if isinstance(error, RuntimeError) else None
    return found.group() if found and os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _print_lost(lost: str) -> None:
    place = f"rank {os.environ['RANK']} ends"
    why = "its own message says why, unless it was killed or the network failed"
    print(f"{place}: another rank is gone or hangs ({lost}); {why}", file=sys.stderr)


def _wait_to_be_ended() -> None:
    """Let the launcher see first which rank failed: it reports that one's code and ends the others."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_GRACE_S)


def _print(error: Exception) -> None:
    place = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"error{place}: {error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
