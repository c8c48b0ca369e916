"""Time the data pipeline beside its alternatives: `python -m benchmarks.pipelines --help`.

All streams read the same shards in the same run, in interleaved rounds. They are checked first: a stream that does
different work ends the run with status 1. Without a GPU all sections run on the CPU, except for the decoder sweep.
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
    dataset_opening,
    loader_memory,
    report,
    shuffle_quality,
    smaller_shards,
    stages,
)
from benchmarks.pipelines.streams import Workload
from iwm_fast.pipelines.transforms.composition import ViewConfig

SECTIONS: dict[str, Callable[[Session, Workload], None]] = {
    "streams": stages.run,
    "sweep": stages.sweep_decoder,
    "log": action_log.run,
    "shuffle": shuffle_quality.run,
    "memory": loader_memory.run,
    "smaller": smaller_shards.run,
    "index": dataset_opening.run,
}
_FULL_BATCH, _QUICK_BATCH = 64, 16


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections that the command line selects; return the exit status."""
    parser = cli.build_parser("pipelines", __doc__, SECTIONS)
    parser.add_argument("--batch-size", type=int, help=f"images per batch: {_FULL_BATCH}, with --quick {_QUICK_BATCH}")
    options = parser.parse_args(arguments)
    session = cli.open_session(options, results.PIPELINES)
    return cli.run(session, SECTIONS, options.only, report, workload_of(options, session.device))


def workload_of(options: argparse.Namespace, device: str) -> Workload:
    """Return the workload that the command line describes."""
    return Workload(
        folder=options.data,
        photographs=PhotographShards(),
        views=ViewConfig(),
        batch_size=options.batch_size or (_QUICK_BATCH if options.quick else _FULL_BATCH),
        threads=machine.num_cores(),
        device=torch.device("cuda", 0) if device == "cuda" else torch.device(device),
        budget=interleave.QUICK if options.quick else interleave.FULL,
    )


if __name__ == "__main__":
    sys.exit(main())
