"""Errors as the user sees them: one message without a traceback, and an exit code that is not 0."""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

_OWN_PACKAGE = "iwm_fast"

# what gloo, NCCL and torch's store say of a process that is gone
_LOST = re.compile(
    r"(connection (was likely )?(closed|reset)|broken pipe|remote process exited|timed out waiting).*?(?=\. |$)",
    re.IGNORECASE | re.MULTILINE,
)
# launchers look for failed processes once a second
_GRACE_S = 2.0


class PeerFailedError(Exception):
    """Another rank failed and reports why; this rank only ends, with exit code 2 and without a message."""


@contextmanager
def user_facing_errors() -> Iterator[None]:
    """Turn errors that are meant for the user into a message and `SystemExit`; let other errors pass.

    Meant for the user are errors that this package raises and those of the file system. What a library raises is a
    defect and keeps its traceback. With IWM_TRACEBACK=1 all keep it. A rank that finds another one gone says so in
    one line.

    Raises:
        SystemExit: with code 2, or 1 if another rank is gone.
    """
    try:
        yield
    except PeerFailedError:
        raise SystemExit(2) from None
    except Exception as error:
        if os.environ.get("IWM_TRACEBACK") == "1":
            raise
        lost = peer_failure_message(error)
        if lost:
            _print_lost(lost)
            _await_termination()
            raise SystemExit(1) from None
        if not _is_for_the_user(error):
            raise
        _print(error)
        raise SystemExit(2) from None


@contextmanager
def same_error_on_all_ranks() -> Iterator[None]:
    """Let rank 0 alone report faults of settings and files, which every rank of a launch finds alike.

    Only for code that reads the same on every rank. What one rank alone runs into must be reported by that rank.

    Raises:
        ValueError, FileNotFoundError: on rank 0, as they were raised.
        PeerFailedError: instead of these on the other ranks.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("RANK", "0") != "0":
            raise PeerFailedError("rank 0 finds the same error and reports it") from error
        raise


def peer_failure_message(error: Exception) -> str:
    """Return what a collective says about a rank that is gone, or an empty string for any other error."""
    found = _LOST.search(str(error)) if isinstance(error, RuntimeError) else None
    return found.group() if found and os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _is_for_the_user(error: Exception) -> bool:
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] == _OWN_PACKAGE:
        return True
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    is_ours = innermost.f_globals.get("__name__", "").split(".")[0] in (_OWN_PACKAGE, "__main__")
    return is_ours and isinstance(error, ValueError | RuntimeError | ArithmeticError)


def _print_lost(lost: str) -> None:
    why = "its own message says why, unless it was killed or the network failed"
    print(f"rank {os.environ['RANK']} ends: another rank is gone or hangs ({lost}); {why}", file=sys.stderr)


def _await_termination() -> None:
    """Wait for the launcher, which must see first which rank failed: it reports that one's code and ends the others."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_GRACE_S)


def _print(error: Exception) -> None:
    of_rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"error{of_rank}: {error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
