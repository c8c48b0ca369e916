"""Errors as the user sees them: one message without a traceback, and an exit code that is not 0."""

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

_SHARED = "found_by_every_rank"
_OWN_PACKAGES = ("iwm_fast", "pipelines", "kernels")


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """End the process with a message if our own code or the file system refused something; let other errors pass.

    What our code raises is written for the user; what a library raises is a defect and keeps its traceback. Set
    IWM_TRACEBACK=1 to see the traceback of both.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("IWM_TRACEBACK") == "1" or not _is_for_the_user(error):
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


def end_process() -> NoReturn:
    """Leave now, with code 0: all is done and written.

    Threads that gloo and DeepSpeed leave behind abort the interpreter's own end about once in a hundred runs
    ("terminate called without an active exception"), and a finished run would count as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _is_for_the_user(error: Exception) -> bool:
    if isinstance(error, OSError) or type(error).__module__.split(".")[0] in _OWN_PACKAGES:
        return True
    *_, (innermost, _) = traceback.walk_tb(error.__traceback__)
    is_ours = innermost.f_globals.get("__name__", "").split(".")[0] in (*_OWN_PACKAGES, "__main__")
    return is_ours and isinstance(error, ValueError | RuntimeError | ArithmeticError)


def _print(error: Exception) -> None:
    place = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"error{place}: {error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
