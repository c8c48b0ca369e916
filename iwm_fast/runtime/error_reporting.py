"""Errors as the user sees them: one message without a traceback, and a nonzero exit code."""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from iwm_fast.runtime.extras import find_missing_package
from iwm_fast.runtime.memory_errors import exhausted_memory

_OUR_PACKAGE = "iwm_fast"

# How gloo, NCCL and torch's store describe a process that has ended. Matches up to the end of the sentence or line.
_PEER_FAILURE = re.compile(
    r"(connection (was likely )?(closed|reset)|broken pipe|remote process exited|timed out waiting).*?(?=\. |$)",
    re.IGNORECASE | re.MULTILINE,
)
# Launchers look for failed processes once a second; two seconds leave them time for one look.
_GRACE_S = 2.0


class PeerFailedError(Exception):
    """Another rank failed and reports the reason; this rank ends with exit code 2 and prints nothing."""


@contextmanager
def user_facing_errors() -> Iterator[None]:
    """Turn errors that are meant for the user into a message and `SystemExit`; let other errors pass.

    Errors that this package raises and those of the file system are meant for the user. An error that a library raises
    indicates a defect and keeps its traceback. With IWM_TRACEBACK=1 every error keeps its traceback. A rank that fails
    because another rank is gone reports that in one line. A package that is not installed is reported with its extra.

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
        failure = peer_failure_message(error)
        if failure:
            _print_peer_failure(failure)
            _await_termination()
            raise SystemExit(1) from None
        explained = find_missing_package(error) or _explain_exhausted_memory(error)
        if explained is None and not _is_for_user(error):
            raise
        _print_error(explained or error)
        raise SystemExit(2) from None


@contextmanager
def same_error_on_all_ranks() -> Iterator[None]:
    """Let rank 0 alone report errors in settings and files, which all ranks of a launch encounter alike.

    Use it only around code that reads the same settings and files on every rank. Other ranks stay silent, so an error
    that occurs on one of them alone would be lost.

    Raises:
        ValueError, FileNotFoundError: on rank 0, as they were raised.
        PeerFailedError: on the other ranks, in place of these errors.
    """
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        if os.environ.get("RANK", "0") != "0":
            raise PeerFailedError("rank 0 encounters the same error and reports it") from error
        raise


def peer_failure_message(error: Exception) -> str:
    """Return the part of a collective's error that describes a rank that is gone; empty for any other error."""
    match = _PEER_FAILURE.search(str(error)) if isinstance(error, RuntimeError) else None
    # A process that runs alone has no other ranks, so the same words come from elsewhere, such as a remote store.
    return match.group() if match and os.environ.get("WORLD_SIZE", "1") != "1" else ""


def _is_for_user(error: Exception) -> bool:
    """Return whether the message of an error is enough for the user: see `user_facing_errors` for which ones are."""
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] == _OUR_PACKAGE:
        return True
    # The innermost frame tells who raised a built-in exception: this package, which wrote the message for the user, or
    # a library that it called.
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    is_ours = innermost.f_globals.get("__name__", "").split(".")[0] in (_OUR_PACKAGE, "__main__")
    return is_ours and isinstance(error, ValueError | RuntimeError | ArithmeticError)


def _explain_exhausted_memory(error: Exception) -> Exception | None:
    """Return a message for a library's error about memory; None for any other error, or if it has one already."""
    exhausted = None if type(error).__module__.startswith(_OUR_PACKAGE) else exhausted_memory(error)
    if exhausted is None:
        return None
    kind, text = exhausted
    hint = "; nvidia-smi lists the processes that use the GPU" if kind == "GPU" else ""
    return RuntimeError(f"out of {kind} memory: {text}{hint}")


def _print_peer_failure(failure: str) -> None:
    hint = "it reports the reason itself unless it was killed or the network failed"
    print(f"rank {os.environ['RANK']} ends: another rank is gone or hangs ({failure}); {hint}", file=sys.stderr)


def _await_termination() -> None:
    """Give the launcher time to end this process.

    The launcher reports the exit code of the first failed process that it sees and ends the others. If this rank ended
    at once, the launcher might report this rank instead of the one that failed.
    """
    # Our own handler for SIGTERM would ask for a clean stop, which this rank can no longer make.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(_GRACE_S)


def _print_error(error: Exception) -> None:
    rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"error{rank}: {error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
