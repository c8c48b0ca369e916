"""Errors as the user sees them: one message without a traceback, and an exit code that is not 0."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

_OWN_PACKAGES = ("iwm_fast", "pipelines", "kernels")


@contextmanager
def errors_as_messages() -> Iterator[None]:
    """End the process with a message if our own code refused something; let every other error pass.

    What our code raises is written for the user; what a library raises is a defect and keeps its traceback. Set
    IWM_TRACEBACK=1 to see both.
    """
    try:
        yield
    except Exception as error:
        if os.environ.get("IWM_TRACEBACK") == "1" or not _is_ours(error.__traceback__):
            raise
        # each rank of a launch finds the same fault in the settings: one message is enough
        is_repeated = isinstance(error, ValueError | FileNotFoundError) and os.environ.get("RANK", "0") != "0"
        if not is_repeated:
            _print(error)
        raise SystemExit(2) from None


def _is_ours(trace: TracebackType | None) -> bool:
    frames = list(traceback.walk_tb(trace))
    # the frames of jaxtyping's checks, when they are on, stand between ours
    module = frames[-1][0].f_globals.get("__name__", "")
    return module.split(".")[0] in _OWN_PACKAGES


def _print(error: Exception) -> None:
    place = f" (rank {os.environ['RANK']})" if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    print(f"error{place}: {error}", file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print(note, file=sys.stderr)
