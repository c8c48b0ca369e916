"""Time the data line beside everything it competes with: `python -m benchmarks.bench_pipelines --help`.

All streams read the same shards in the same run, in turns, and are checked first: one that does other work than the
rest ends the run with status 1. Without a GPU everything runs on the CPU but the sweep of a GPU's decoder.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import (
    bench_action_log,
    bench_conditionals,
    bench_decoder_sweep,
    bench_memory,
    bench_shuffle,
    bench_startup,
    bench_streams,
    machine,
    pipeline_tables,
    report,
    timing,
    turns,
)
from benchmarks.pipeline_shards import PhotographShards
from benchmarks.pipeline_streams import Workload
from benchmarks.session import Session, WrongResultError
from pipelines.config import ViewConfig

SECTIONS: dict[str, Callable[[Session, Workload], None]] = {
    "streams": bench_streams.run,
    "sweep": bench_decoder_sweep.run,
    "log": bench_action_log.run,
    "conditionals": bench_conditionals.run,
    "shuffle": bench_shuffle.run,
    "memory": bench_memory.run,
    "startup": bench_startup.run,
}
_FULL_BATCH, _QUICK_BATCH = 64, 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; return the exit status."""
    options = parse(arguments)
    about = machine.describe(options.commit, machine.PIPELINE_PACKAGES)
    out = options.out or report.RESULTS / f"{machine.slug(report.processor(about))}{report.PIPELINES}.jsonl"
    session = Session(
        about,
        effort=timing.QUICK if options.quick else timing.FULL,
        device="cuda" if torch.cuda.is_available() else "cpu",
        out=out,
        limit_s=options.limit_s,
    )
    if session.device == "cpu":
        # as a run does, so that decoding threads and torch's do not fight for the same cores
        torch.set_num_threads(1)
    print(report.machine_line(about))
    status = 0
    try:
        measure(session, workload_of(options, session.device), options.only)
    except WrongResultError as error:
        print(f"\nwrong result: {error}", file=sys.stderr)
        status = 1
    print(f"\n{pipeline_tables.sections(session.records, level='##')}\n")
    for label in session.left_out:
        print(f"left out: {label}")
    print(f"written to {out}")
    return status


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    cache = Path(os.environ.get("IWM_CACHE") or Path.home() / ".cache" / "iwm-fast")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_pipelines", description=__doc__)
    parser.add_argument("--only", choices=SECTIONS, help="one section instead of all")
    parser.add_argument("--memory", dest="only", action="store_const", const="memory", help="short for --only memory")
    parser.add_argument("--quick", action="store_true", help="fewer, shorter turns of smaller batches")
    parser.add_argument("--limit-s", type=float, default=1e9, help="start nothing new after so many seconds")
    parser.add_argument("--out", type=Path, help="append here; default benchmarks/results/<GPU or CPU>-pipelines.jsonl")
    parser.add_argument("--commit", help="what was measured, where there is no git to ask")
    parser.add_argument("--data", type=Path, default=cache / "benchmarks", help="where the shards are kept: 0.6 GB")
    parser.add_argument("--batch-size", type=int, help=f"images of a batch; {_FULL_BATCH}, with --quick {_QUICK_BATCH}")
    return parser.parse_args(arguments)


def workload_of(options: argparse.Namespace, device: str) -> Workload:
    """Return what the command line makes every stream do."""
    return Workload(
        folder=options.data,
        photographs=PhotographShards(),
        views=ViewConfig(),
        batch_size=options.batch_size or (_QUICK_BATCH if options.quick else _FULL_BATCH),
        threads=machine.num_cores(),
        device=torch.device("cuda", 0) if device == "cuda" else torch.device(device),
        turns=turns.QUICK if options.quick else turns.FULL,
    )


def measure(session: Session, workload: Workload, only: str | None) -> None:
    """Run the sections one after the other as long as there is time."""
    for name, section in SECTIONS.items():
        if only in (None, name) and session.has_time(name):
            section(session, workload)


if __name__ == "__main__":
    sys.exit(main())
