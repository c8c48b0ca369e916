"""What an entry point does at the start and at the end of its process; libraries do none of it."""

import logging
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from iwm_fast.runtime.error_reporting import user_facing_errors
from iwm_fast.runtime.preemption import Preemption


def watch_signals() -> Preemption:
    """Watch for signals and for the launcher's end from now on; once in a process, on its main thread."""
    preemption = Preemption()
    preemption.install_handlers(watch_parent="RANK" in os.environ)
    return preemption


def log_to_console() -> None:
    """Print log messages to standard error: from INFO on rank 0, from WARNING with the rank's number elsewhere."""
    rank = os.environ.get("RANK", "0")
    level, mark = (logging.INFO, "") if rank == "0" else (logging.WARNING, f"[rank {rank}] ")
    logging.basicConfig(level=level, format=f"{mark}%(message)s")


def run_and_exit(act: Callable[[], None]) -> NoReturn:
    """Call the function that this process exists for, report its errors, and end the process with the exit code."""
    code = 0
    try:
        with user_facing_errors():
            act()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
    end_process(code)


def end_process(code: int = 0) -> NoReturn:
    """End the process at once with an exit code; everything must be written by now.

    Threads that gloo and DeepSpeed leave behind abort the interpreter's own end about once in a hundred runs
    ("terminate called without an active exception"), and a finished run would count as failed.
    """
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
