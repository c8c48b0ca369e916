"""Time the data line beside everything it competes with: `python -m benchmarks.pipelines --help`.

All streams read the same shards in the same run, in turns, and are checked first: one that does other work than the
rest ends the run with status 1. Without a GPU everything runs on the CPU but the sweep of a GPU's decoder.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.harness import cli, interleave, machine, results
from benchmarks.harness.photograph_shards import PhotographShards
from benchmarks.harness.session import Session
from benchmarks.pipelines import (
    action_log,
    dali_conditionals,
    loader_memory,
    report,
    shuffle_quality,
    stages,
    startup,
)
from benchmarks.pipelines.streams import Workload
from iwm_fast.pipelines.config import ViewConfig

SECTIONS: dict[str, Callable[[Session, Workload], None]] = {
    "streams": stages.run,
    "sweep": stages.sweep_decoder,
    "log": action_log.run,
    "conditionals": dali_conditionals.run,
    "shuffle": shuffle_quality.run,
    "memory": loader_memory.run,
    "startup": startup.run,
}
_FULL_BATCH, _QUICK_BATCH = 64, 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; return the exit status."""
    options = parse(arguments)
    session = cli.open_session(options, machine.PIPELINE_PACKAGES, suffix=results.PIPELINES)
    if session.device == "cpu":
        # as a run does, so that decoding threads and torch's do not fight for the same cores
        torch.set_num_threads(1)
    workload = workload_of(options, session.device)
    return cli.run_and_report(
        session,
        lambda: cli.run_sections(session, SECTIONS, options.only, workload),
        lambda found: report.sections(found, level="##"),
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.parser("pipelines", __doc__, SECTIONS, suffix=results.PIPELINES)
    parser.add_argument("--memory", dest="only", action="store_const", const="memory", help="short for --only memory")
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
        turns=interleave.QUICK if options.quick else interleave.FULL,
    )


if __name__ == "__main__":
    sys.exit(main())
