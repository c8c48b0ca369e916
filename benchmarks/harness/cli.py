"""What the commands share: their arguments, and how a session is conducted from begin to end."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine, results, timing
from benchmarks.harness.records import Record
from benchmarks.harness.session import Session, WrongResultError


def parser(
    module: str, summary: str | None, sections: Iterable[str], *, suffix: str, needs_data: bool = True
) -> argparse.ArgumentParser:
    """Return a parser of the arguments that all of them have; `suffix` ends the name of the default result file."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=summary)
    made.add_argument("--only", choices=list(sections), help="one section instead of all")
    made.add_argument("--quick", action="store_true", help="fewer, shorter turns of less work: does it run?")
    made.add_argument("--limit-s", type=float, default=1e9, help="start nothing new after so many seconds")
    made.add_argument("--out", type=Path, help=f"append here; default benchmarks/results/<GPU or CPU>{suffix}.jsonl")
    made.add_argument("--commit", help="what was measured, where there is no git to ask")
    if needs_data:
        cache = Path(os.environ.get("IWM_CACHE") or Path.home() / ".cache" / "iwm-fast")
        made.add_argument("--data", type=Path, default=cache / "benchmarks", help="where the shards are kept: 0.6 GB")
    return made


def open_session(
    options: argparse.Namespace, packages: Sequence[str] = (), *, suffix: str, without: Sequence[str] = ()
) -> Session:
    """Return the session that the arguments ask for, on a GPU if there is one."""
    about = machine.describe(options.commit, packages)
    return Session(
        about,
        effort=timing.QUICK if options.quick else timing.FULL,
        device="cuda" if torch.cuda.is_available() else "cpu",
        out=options.out or results.RESULTS / f"{machine.slug(machine.processor(about))}{suffix}.jsonl",
        limit_s=options.limit_s,
        without=without,
    )


def run_sections(
    session: Session, sections: Mapping[str, Callable[..., None]], only: str | None, *arguments: Any
) -> None:
    """Call the sections, or the only one, with session and arguments one after the other as long as there is time."""
    for name, section in sections.items():
        if only in (None, name) and session.has_time(name):
            section(session, *arguments)


def run_and_report(session: Session, measure: Callable[[], None], tables: Callable[[list[Record]], str]) -> int:
    """Measure, print tables of what was found, and return the exit status: 1 if someone computed something else."""
    print(machine.machine_line(session.machine))
    status = 0
    try:
        measure()
    except WrongResultError as error:
        print(f"\nwrong result: {error}", file=sys.stderr)
        status = 1
    print(f"\n{tables(session.records)}\n")
    for label in session.left_out:
        print(f"left out: {label}")
    print(f"written to {session.out}")
    return status
