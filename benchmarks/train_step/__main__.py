"""Time the training step under every engine, side by side: `python -m benchmarks.train_step --help`.

All train the same networks on the same batch, step in turns in one process, and are checked first: one whose loss is
another than the bare loop's ends the run with status 1. Without a GPU a ViT-S/16 trains on one core.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import repeat

import torch

from benchmarks.harness import cli, results
from benchmarks.harness.session import Case, Session
from benchmarks.harness.timing import Failure, in_turns
from benchmarks.train_step import report
from benchmarks.train_step.engines import Training, contestants_of
from benchmarks.train_step.measure import Comparison, StepTurn, check_losses, compare, note, take_turn
from benchmarks.train_step.report import BARE, CACHED, COMPILED, DDP, DEFAULT, FUSED, LOADING, SHARDS, STEP
from benchmarks.train_step.two_ranks import NUM_RANKS, compare_on_ranks
from benchmarks.train_step.workload import StepWorkload, build_workload
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo

PACKAGES = ("deepspeed", "nvidia-dali-cuda130", "numpy")
_RANKS_LIMIT_S = 900.0
_LOADER_STEPS = 3
"""Steps of a loader's turn over those of a cached batch's: the batches made ahead must run out."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; return the exit status."""
    options = cli.parser("train_step", __doc__, SECTIONS, suffix=results.STEPS).parse_args(arguments)
    rank_info = distributed.start("cuda" if torch.cuda.is_available() else "cpu")
    session = cli.open_session(options, PACKAGES, suffix=results.STEPS)
    workload = build_workload(options.data, rank_info.device, options.quick)
    try:
        return cli.run_and_report(
            session,
            lambda: cli.run_sections(session, SECTIONS, options.only, workload, rank_info),
            lambda found: report.sections(found, level="##"),
        )
    finally:
        distributed.stop()


def engines(session: Session, workload: StepWorkload, rank_info: RankInfo) -> None:
    """Compare every engine with the bare loop, on one rank."""
    contestants = contestants_of(workload)
    if not workload.with_compile:
        session.left_out.append("engines: compiled")
    found = compare(workload, contestants, rank_info, deadline=session.deadline_of(0.6))
    check_losses(found.losses, next(iter(contestants)), workload.precision)
    case = Case(STEP, workload.shape(1), workload.precision)
    note(session, workload, case, found, base_of=base_of, rank_info=rank_info)


def base_of(name: str) -> str:
    """Return which bare loop does the same work: nothing is compiled in it."""
    return BARE + FUSED if FUSED in name else BARE


def ranks(session: Session, workload: StepWorkload, rank_info: RankInfo) -> None:
    """Compare DistributedDataParallel with DeepSpeed on two ranks."""
    if rank_info.device.type == "cuda" and torch.cuda.device_count() < NUM_RANKS:
        session.left_out.append(f"ranks: there are no {NUM_RANKS} GPUs")
        return
    case = Case(STEP, workload.shape(NUM_RANKS), workload.precision)
    limit_s = min(_RANKS_LIMIT_S, max(session.deadline - time.monotonic(), 60.0))
    try:
        found = compare_on_ranks(workload.folder, rank_info.device, session.is_quick, limit_s)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        session.note_failure(case, DDP, error)
        return
    check_losses(found.losses, DDP, workload.precision)
    both = RankInfo(rank=0, local_rank=0, world_size=NUM_RANKS, device=rank_info.device)
    note(session, workload, case, found, base_of=lambda _: DDP, rank_info=both)


def loading(session: Session, workload: StepWorkload, rank_info: RankInfo) -> None:
    """Compare a step whose batch is there already with one that the real loader feeds."""
    name = fastest(workload)
    case = Case(LOADING, workload.shape(1) | {"engine": name}, workload.precision)
    try:
        training = Training(contestants_of(workload)[name], workload, rank_info)
        found = with_and_without_loader(session, workload, rank_info, training)
    except Exception as error:
        session.note_failure(case, SHARDS, error)
        return
    note(session, workload, case, Comparison(found, {}, {}), base_of=lambda _: CACHED, rank_info=rank_info)


def fastest(workload: StepWorkload) -> str:
    """Return the default engine with all that makes it fast on a GPU; on a CPU compiling takes its time."""
    ending = FUSED + (COMPILED if workload.with_compile else "") if workload.device.type == "cuda" else ""
    return DEFAULT + ending


def with_and_without_loader(
    session: Session, workload: StepWorkload, rank_info: RankInfo, training: Training
) -> dict[str, list[StepTurn] | Failure]:
    """Let one training step in turns on a cached batch and on what a loader brings."""
    cached = repeat(workload.cached_batch(rank_info))
    training.warm_up(cached, workload.turns.warm_ups)
    runtime, steps = training.config.runtime, _LOADER_STEPS * workload.turns.steps
    turns: dict[str, list[StepTurn]] = {CACHED: [], SHARDS: []}
    with closing(workload.loader(rank_info)) as loader:
        # what was made ahead in the other's turn would hide the wait
        sources = {CACHED: (cached, 0), SHARDS: (loader, runtime.prefetch + runtime.read_ahead)}
        rounds = max(workload.turns.rounds // 2, 1)
        for name in in_turns(sources, rounds, lambda number: session.has_time(f"loader, round {number}")):
            batches, ahead = sources[name]
            turns[name].append(take_turn(training, batches, steps, rank_info, left_out=ahead))
    return dict(turns)


SECTIONS: dict[str, Callable[[Session, StepWorkload, RankInfo], None]] = {
    "engines": engines,
    "ranks": ranks,
    "loader": loading,
}

if __name__ == "__main__":
    sys.exit(main())
