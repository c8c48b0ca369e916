"""What the commands have in common: arguments, sessions, and the report at the end."""

import argparse
import os
import sys
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import machine, results, timing
from benchmarks.harness.device import UnusableGpuError
from benchmarks.harness.session import Case, Session, WrongResultError


def build_parser(
    module: str, summary: str | None, sections: Iterable[str], *, needs_data: bool = True
) -> argparse.ArgumentParser:
    """Return a parser of the common arguments."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=summary)
    parser.add_argument("--only", choices=list(sections), nargs="+", help="run these sections instead of all")
    parser.add_argument("--quick", action="store_true", help="smoke test: fewer and shorter rounds on smaller problems")
    parser.add_argument("--limit-s", type=float, default=1e9, help="start no new measurement after this many seconds")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or results.RESULTS),
        help="folder of the results, to which every measurement is appended at once. A second run of the same commit "
        "on the same machine measures only what is missing. Default: $OUT, or benchmarks/results",
    )
    parser.add_argument("--commit", help="commit to record instead of git's, or of a hash of the sources")
    if needs_data:
        cache = Path(os.environ.get("IWM_CACHE") or Path.home() / ".cache" / "iwm-fast")
        parser.add_argument("--data", type=Path, default=cache / "benchmarks", help="folder for the shards (0.6 GB)")
    return parser


def open_session(options: argparse.Namespace, suffix: str) -> Session:
    """Return a session with the parsed options, on a GPU if there is one; `suffix` ends the name of its file."""
    description, has_gpu = machine.describe(options.commit), torch.cuda.is_available()
    if not has_gpu:
        # As in a training run, so that the threads of DALI and PyTorch do not compete for the same cores.
        torch.set_num_threads(1)
    return Session(
        description,
        budget=timing.QUICK if options.quick else timing.FULL,
        device="cuda" if has_gpu else "cpu",
        out=options.out / f"{machine.slug(machine.processor_name(description))}{suffix}.jsonl",
        limit_s=options.limit_s,
    )


def run(
    session: Session,
    sections: Mapping[str, Callable[..., None]],
    only: Container[str] | None,
    report: Any,
    *arguments: Any,
) -> int:
    """Call all sections, or only some, with session and arguments while there is time; print the tables of `report`.

    Return the exit status: 1 if a provider computed a wrong result, or left the GPU unusable, which ends the run.
    """
    error_message = ""
    print(machine.describe_in_words(session.machine))
    if session.records:
        print(f"{len(session.records)} earlier records of {session.out} are kept; another --out measures again")
    try:
        for name, section in sections.items():
            case = Case("section", {"section": name}, dtype="")
            if name not in (only or sections) or session.is_measured(case) or not session.has_time(name):
                continue
            num_skipped = len(session.skipped)
            section(session, *arguments)
            if len(session.skipped) == num_skipped:
                session.record(case, "")
    except WrongResultError as error:
        session.wrong.append(str(error))
    except UnusableGpuError as error:
        error_message = f"error: {error}; the failure is recorded; run the same command again to continue after it"
    print(f"\n{report.sections(session.records, level='##')}\n")
    for label in session.skipped:
        print(f"skipped: {label}")
    for message in session.wrong:
        print(f"wrong result: {message}", file=sys.stderr)
    print(f"written to {session.out}")
    if error_message:
        print(error_message, file=sys.stderr)
    return 1 if session.wrong or error_message else 0
