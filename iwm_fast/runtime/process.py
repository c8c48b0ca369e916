"""What an entry point does when its process starts and ends; library code does none of this."""

import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

from iwm_fast.pipelines.errors import printable_lines
from iwm_fast.pipelines.worker_processes import keep_freed_memory
from iwm_fast.runtime.error_reporting import user_facing_errors
from iwm_fast.runtime.preemption import EXIT_ABORTED, Preemption

# What a shell reports of other programs whose output is no longer read, as in `yes | head`.
EXIT_CLOSED_PIPE = 128 + signal.SIGPIPE


def watch_signals() -> Preemption:
    """Start to watch for signals and for the launcher's end; call it once in a process, on its main thread."""
    preemption = Preemption()
    preemption.install_handlers(watch_parent="RANK" in os.environ)
    return preemption


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """Return the arguments without --local_rank or --local-rank, which launchers may add in one word or in two."""
    options = ("--local_rank", "--local-rank")
    return [
        argument
        for before, argument in zip(["", *arguments], arguments, strict=False)
        if argument.partition("=")[0] not in options and not (before in options and argument.isdigit())
    ]


def log_to_console() -> None:
    """Print log messages to standard error: from INFO on rank 0, from WARNING with the rank's number on others."""
    rank = os.environ.get("RANK", "0")
    level, prefix = (logging.INFO, "") if rank == "0" else (logging.WARNING, f"[rank {rank}] ")
    handler = logging.StreamHandler()
    handler.setFormatter(_PrintableFormatter(f"{prefix}%(message)s"))
    logging.basicConfig(level=level, handlers=[handler])


class _PrintableFormatter(logging.Formatter):
    """Writes what is not printable as escapes, because messages repeat names of files, which may hold anything."""

    def format(self, record: logging.LogRecord) -> str:
        return printable_lines(super().format(record))


def run_and_exit(function: Callable[[], None]) -> NoReturn:
    """Call the main function of this process, report its errors, and end the process with the exit code."""
    # Commands that check or pack few shards decode images in this process.
    keep_freed_memory()
    code = 0
    try:
        with user_facing_errors(), _quiet_on_closed_pipe():
            function()
    except SystemExit as stop:
        # As the interpreter does: no code means success, and a message instead of a number means failure.
        code = stop.code if isinstance(stop.code, int) else int(bool(stop.code))
    # Ctrl-C during a command that saves nothing before it ends.
    except KeyboardInterrupt:
        code = EXIT_ABORTED
    end_process(code)


def end_process(code: int = 0) -> NoReturn:
    """End the process immediately with an exit code, without the interpreter's own cleanup.

    All files must be written by now. Threads that gloo and DeepSpeed leave running abort the interpreter's cleanup
    about once in a hundred runs ("terminate called without an active exception"), and a finished run would be reported
    as failed.
    """
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        # A pipe without reader or a full disk, which `run_and_exit` has reported.
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def print_last_words(text: str) -> None:
    """Print to standard error, unless it is gone: a closed terminal, or `tee`, which Ctrl-C ended first."""
    with suppress(OSError):
        print(text, file=sys.stderr, flush=True)


@contextmanager
def _quiet_on_closed_pipe() -> Iterator[None]:
    """End without a message if standard output is a pipe that is no longer read, as in `iwm --help | head`."""
    try:
        yield
        # Short output is written only now.
        sys.stdout.flush()
    except BrokenPipeError:
        if not _is_stdout_closed():
            raise
    except SystemExit as stop:
        # rich ends the process by itself, with code 1, when it cannot print.
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
    else:
        return
    raise SystemExit(EXIT_CLOSED_PIPE)


def _is_stdout_closed() -> bool:
    """Return whether standard output is a pipe without a reader; a broken pipe may also be a connection to a store."""
    poll = select.poll()
    # No event is requested, because errors are always reported.
    poll.register(1, 0)
    return bool(poll.poll(0))
