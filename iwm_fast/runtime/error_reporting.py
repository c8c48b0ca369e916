"""Errors as the user sees them: one message without a traceback, and a nonzero exit code."""

import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from iwm_fast.pipelines.errors import printable_lines
from iwm_fast.runtime.extras import find_missing_package
from iwm_fast.runtime.memory_errors import exhausted_memory

_OUR_PACKAGE = "iwm_fast"

# How gloo, NCCL and torch's store describe a process that has ended. Matches up to the end of the sentence or line.
_PEER_FAILURE = re.compile(
    r"(connection (was likely )?(closed|reset)|broken pipe|remote process exited|timed out waiting|wait timeout)"
    r".*?(?=\. |$)",
    re.IGNORECASE | re.MULTILINE,
)
_ERRNO = re.compile(r"^\[Errno \d+\] ")
# Launchers look for failed processes once a second; two seconds leave them time for one look.
_GRACE_S = 2.0
# For an error that rank 0 most probably has, too. Longer, because a second message would confuse.
_SHARED_GRACE_S = 5.0


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
            _await_termination(_GRACE_S)
            raise SystemExit(1) from None
        explained = find_missing_package(error) or _explain_exhausted_memory(error)
        if explained is None and not _is_for_user(error):
            raise
        _print_error(explained or error)
        raise SystemExit(2) from None


@contextmanager
def same_error_on_all_ranks() -> Iterator[None]:
    """Let rank 0 report errors in settings, files and installations, which all ranks usually encounter alike.

    The other ranks give the launcher time to end them, because rank 0 has failed. If they are still there, the error
    is theirs alone, for instance because a file is missing on their machine, and they raise it, too.

    Raises:
        ValueError, OSError, ImportError: as they were raised, after a while on ranks other than 0.
    """
    try:
        yield
    except (ValueError, OSError, ImportError):
        if os.environ.get("RANK", "0") != "0":
            _await_termination(_SHARED_GRACE_S)
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


def _await_termination(grace_s: float) -> None:
    """Give the launcher time to end this process, because another rank has failed, too, or first.

    The launcher reports the exit code of the first failed process that it sees and ends the others. If this rank ended
    at once, the launcher might report this rank instead of the one that failed.
    """
    # Our own handler for SIGTERM would ask for a clean stop, which this rank can no longer make.
    # Only the main thread of a program that uses the Python API may change it.
    with suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(grace_s)


def _print_error(error: Exception) -> None:
    rank = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    # Without the number of an error of the operating system, which says nothing to most users.
    for line in (f"error{rank}: {_ERRNO.sub('', str(error))}", *getattr(error, "__notes__", ())):
        # Messages repeat names of files, which may hold anything.
        print(printable_lines(line), file=sys.stderr)
