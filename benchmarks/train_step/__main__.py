"""Time the training step under all engines, side by side: `python -m benchmarks.train_step --help`.

All engines train the same networks on the same batch, in interleaved rounds in one process. They are checked first: a
loss that differs from the bare loop's ends the run with status 1. Without a GPU a ViT-S/16 trains on one core.
"""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from itertools import repeat

import torch

from benchmarks.harness import cli, results
from benchmarks.harness.session import Case, Session
from benchmarks.harness.timing import Failure, interleaved_rounds
from benchmarks.train_step import report
from benchmarks.train_step.engines import Training, engine_configs
from benchmarks.train_step.measure import Comparison, StepRound, check_losses, compare, record, run_round
from benchmarks.train_step.report import BARE, CACHED, COMPILED, DDP, DEFAULT, FUSED, LOADING, SHARDS, STEP
from benchmarks.train_step.two_ranks import NUM_RANKS, compare_on_ranks
from benchmarks.train_step.workload import StepWorkload, build_workload
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo

PACKAGES = ("deepspeed", "nvidia-dali-cuda130", "numpy")
_RANKS_LIMIT_S = 900.0
_LOADER_STEPS = 3
"""Factor on the number of steps per round with a loader, so that the prefetched batches are used up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections that the command line selects; return the exit status."""
    options = cli.build_parser("train_step", __doc__, SECTIONS, suffix=results.STEPS).parse_args(arguments)
    rank_info = distributed.start("cuda" if torch.cuda.is_available() else "cpu")
    session = cli.open_session(options, PACKAGES, suffix=results.STEPS)
    workload = build_workload(options.data, rank_info.device, options.quick)
    try:
        return cli.run_and_report(
            session,
            lambda: cli.run_sections(session, SECTIONS, options.only, workload, rank_info),
            lambda records: report.sections(records, level="##"),
        )
    finally:
        distributed.stop()


def compare_engines(session: Session, workload: StepWorkload, rank_info: RankInfo) -> None:
    """Compare all engines with the bare loop on one rank."""
    configs = engine_configs(workload)
    if not workload.with_compile:
        session.skipped.append("engines: compiled")
    # The rest of the time is for the other two sections.
    comparison = compare(workload, configs, rank_info, deadline=session.deadline_of(0.6))
    check_losses(comparison.losses, next(iter(configs)), workload.precision)
    case = Case(STEP, workload.shape(1), workload.precision)
    record(session, workload, case, comparison, baseline_of=baseline_of, rank_info=rank_info)


def baseline_of(name: str) -> str:
    """Return the name of the bare loop with the same kernels; there is no compiled one."""
    return BARE + FUSED if FUSED in name else BARE


def compare_two_ranks(session: Session, workload: StepWorkload, rank_info: RankInfo) -> None:
    """Compare DistributedDataParallel with DeepSpeed on two ranks."""
    if rank_info.device.type == "cuda" and torch.cuda.device_count() < NUM_RANKS:
        session.skipped.append(f"ranks: there are fewer than {NUM_RANKS} GPUs")
        return
    case = Case(STEP, workload.shape(NUM_RANKS), workload.precision)
    limit_s = min(_RANKS_LIMIT_S, max(session.deadline - time.monotonic(), 60.0))
    try:
        comparison = compare_on_ranks(workload.folder, rank_info.device, session.quick, limit_s)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        session.record_failure(case, DDP, error)
        return
    check_losses(comparison.losses, DDP, workload.precision)
    both_ranks = RankInfo(rank=0, local_rank=0, world_size=NUM_RANKS, device=rank_info.device)
    record(session, workload, case, comparison, baseline_of=lambda _: DDP, rank_info=both_ranks)


def compare_loading(session: Session, workload: StepWorkload, rank_info: RankInfo) -> None:
    """Compare steps on a cached batch with steps on batches from the loader."""
    name = fastest_engine(workload)
    case = Case(LOADING, workload.shape(1) | {"engine": name}, workload.precision)
    try:
        training = Training(engine_configs(workload)[name], workload, rank_info)
        rounds = run_with_both_sources(session, workload, rank_info, training)
    except Exception as error:
        session.record_failure(case, SHARDS, error)
        return
    record(session, workload, case, Comparison(rounds, {}, {}), baseline_of=lambda _: CACHED, rank_info=rank_info)


def fastest_engine(workload: StepWorkload) -> str:
    """Return the name of the default engine, on a GPU with fused kernels and torch.compile."""
    suffix = FUSED + (COMPILED if workload.with_compile else "") if workload.device.type == "cuda" else ""
    return DEFAULT + suffix


def run_with_both_sources(
    session: Session, workload: StepWorkload, rank_info: RankInfo, training: Training
) -> dict[str, list[StepRound] | Failure]:
    """Run rounds of one training run, alternately on a cached batch and on batches from the loader."""
    cached = repeat(workload.cached_batch(rank_info))
    training.warm_up(cached, workload.budget.warm_ups)
    runtime, steps = training.config.runtime, _LOADER_STEPS * workload.budget.steps
    rounds: dict[str, list[StepRound]] = {CACHED: [], SHARDS: []}
    with closing(workload.loader(rank_info)) as loader:
        # The loader prefetches batches during the rounds of the cached batch. They would hide the wait.
        sources = {CACHED: (cached, 0), SHARDS: (loader, runtime.prefetch + runtime.read_ahead)}
        num_rounds = max(workload.budget.rounds // 2, 1)
        for name in interleaved_rounds(sources, num_rounds, lambda number: session.has_time(f"loader, round {number}")):
            batches, prefetched = sources[name]
            rounds[name].append(run_round(training, batches, steps, rank_info, skipped=prefetched))
    return dict(rounds)


SECTIONS: dict[str, Callable[[Session, StepWorkload, RankInfo], None]] = {
    "engines": compare_engines,
    "ranks": compare_two_ranks,
    "loader": compare_loading,
}

if __name__ == "__main__":
    sys.exit(main())
