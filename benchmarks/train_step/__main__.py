"""Time the training step under every engine, side by side: `python -m benchmarks.train_step --help`.

All train the same networks on the same batch, step in turns in one process, and are checked first: one whose loss is
another than the bare loop's ends the run with status 1. Without a GPU a ViT-S/16 trains on one core.
"""

import sys
import time
from collections.abc import Callable, Sequence
from itertools import repeat

import torch

from benchmarks.harness import cli, results
from benchmarks.harness.session import Case, Session
from benchmarks.harness.timing import Failure, first_line
from benchmarks.train_step import report as step_tables
from benchmarks.train_step.engines import Contestant, Training, contestants_of
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
    session = cli.open_session(options, rank_info.device.type, PACKAGES, suffix=results.STEPS)
    try:
        return cli.conduct(
            session,
            lambda: measure(
                session, build_workload(options.data, rank_info.device, options.quick), rank_info, options.only
            ),
            lambda found: step_tables.sections(found, level="##"),
        )
    finally:
        distributed.stop()


def measure(session: Session, workload: StepWorkload, rank_info: RankInfo, only: str | None) -> None:
    """Run the sections one after the other as long as there is time."""
    for name, section in SECTIONS.items():
        if only in (None, name) and session.has_time(name):
            section(session, workload, rank_info)


def engines(session: Session, workload: StepWorkload, rank_info: RankInfo) -> None:
    """Compare every engine with the bare loop, on one rank."""
    deadline = session.deadline_of(0.6)
    contestants = contestants_of(workload)
    if not workload.with_compile:
        session.left_out.append("engines: compiled")
    found = compare(workload, contestants, rank_info, has_time=lambda: time.monotonic() < deadline)
    base = contestants[0].name
    check_losses(found.losses, base, workload.precision)
    bases = {one.name: base_of(one.name) for one in contestants}
    note(session, workload, Case(STEP, workload.shape(1), workload.precision), found, bases=bases, rank_info=rank_info)


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
        session.note(case, DDP, failure=first_line(error))
        return
    check_losses(found.losses, DDP, workload.precision)
    both = RankInfo(rank=0, local_rank=0, world_size=NUM_RANKS, device=rank_info.device)
    note(session, workload, case, found, bases=dict.fromkeys(found.turns, DDP), rank_info=both)


def loading(session: Session, workload: StepWorkload, rank_info: RankInfo) -> None:
    """Compare a step whose batch is there already with one that the real loader feeds."""
    chosen = fastest(workload)
    case = Case(LOADING, workload.shape(1) | {"engine": chosen.name}, workload.precision)
    try:
        found = with_and_without_loader(session, workload, rank_info, chosen)
    except Exception as error:
        session.note(case, SHARDS, failure=first_line(error))
        return
    note(session, workload, case, Comparison(found, {}, {}), bases={SHARDS: CACHED}, rank_info=rank_info)


def fastest(workload: StepWorkload) -> Contestant:
    """Return the default engine with all that makes it fast on a GPU; on a CPU compiling takes its time."""
    ending = FUSED + (COMPILED if workload.with_compile else "") if workload.device.type == "cuda" else ""
    return next(one for one in contestants_of(workload) if one.name == DEFAULT + ending)


def with_and_without_loader(
    session: Session, workload: StepWorkload, rank_info: RankInfo, contestant: Contestant
) -> dict[str, list[StepTurn] | Failure]:
    """Let one training step in turns on a cached batch and on what a loader brings."""
    training, cached = Training(contestant, workload, rank_info), repeat(workload.cached_batch(rank_info))
    training.warm_up(cached, workload.turns.warm_ups)
    runtime, steps = training.config.runtime, _LOADER_STEPS * workload.turns.steps
    turns: dict[str, list[StepTurn]] = {CACHED: [], SHARDS: []}
    loader = workload.loader(rank_info)
    try:
        for number in range(max(workload.turns.rounds // 2, 1)):
            if number > 0 and not session.has_time(f"loader, round {number + 1}"):
                break
            turns[CACHED].append(take_turn(training, cached, steps, rank_info))
            # what was made ahead in the other's turn would hide the wait
            ahead = runtime.prefetch + runtime.read_ahead
            turns[SHARDS].append(take_turn(training, loader, steps, rank_info, left_out=ahead))
    finally:
        loader.close()
    return dict(turns)


SECTIONS: dict[str, Callable[[Session, StepWorkload, RankInfo], None]] = {
    "engines": engines,
    "ranks": ranks,
    "loader": loading,
}

if __name__ == "__main__":
    sys.exit(main())
