"""What the commands have in common: arguments, sessions, and the report at the end."""

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


def build_parser(
    module: str, summary: str | None, sections: Iterable[str], *, suffix: str, needs_data: bool = True
) -> argparse.ArgumentParser:
    """Return a parser of the common arguments; `suffix` ends the name of the default result file."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=summary)
    parser.add_argument("--only", choices=list(sections), help="run one section instead of all")
    parser.add_argument("--quick", action="store_true", help="smoke test: fewer and shorter rounds on smaller problems")
    parser.add_argument("--limit-s", type=float, default=1e9, help="start no new measurement after this many seconds")
    parser.add_argument(
        "--out", type=Path, help=f"append to this file; default: benchmarks/results/<GPU or CPU>{suffix}.jsonl"
    )
    parser.add_argument("--commit", help="commit to record where there is no git repository")
    if needs_data:
        cache = Path(os.environ.get("IWM_CACHE") or Path.home() / ".cache" / "iwm-fast")
        parser.add_argument("--data", type=Path, default=cache / "benchmarks", help="folder for the shards (0.6 GB)")
    return parser


def open_session(
    options: argparse.Namespace, packages: Sequence[str] = (), *, suffix: str, excluded: Sequence[str] = ()
) -> Session:
    """Return a session with the parsed options, on a GPU if there is one."""
    description = machine.describe(options.commit, packages)
    return Session(
        description,
        budget=timing.QUICK if options.quick else timing.FULL,
        device="cuda" if torch.cuda.is_available() else "cpu",
        out=options.out or results.RESULTS / f"{machine.slug(machine.processor_name(description))}{suffix}.jsonl",
        limit_s=options.limit_s,
        excluded=excluded,
    )


def run_sections(
    session: Session, sections: Mapping[str, Callable[..., None]], only: str | None, *arguments: Any
) -> None:
    """Call all sections, or `only` one, with the session and the arguments while there is time."""
    for name, section in sections.items():
        if only in (None, name) and session.has_time(name):
            section(session, *arguments)


def run_and_report(session: Session, measure: Callable[[], None], tables: Callable[[list[Record]], str]) -> int:
    """Measure, print the tables, and return the exit status: 1 if a provider computed a wrong result."""
    print(machine.describe_in_words(session.machine))
    status = 0
    try:
        measure()
    except WrongResultError as error:
        print(f"\nwrong result: {error}", file=sys.stderr)
        status = 1
    print(f"\n{tables(session.records)}\n")
    for label in session.skipped:
        print(f"skipped: {label}")
    print(f"written to {session.out}")
    return status
