"""Time the training step: kernels against PyTorch's, and all engines: `python -m benchmarks.train_step --help`.

"ops" trains with the reference, with all kernels, and with those of one operation; "engines" compares engines in
interleaved rounds. Both use made-up batches on masks of training; "loader" reads shards. The status is 1 if losses do
not agree, or if a training with fused operations fails. Without a GPU a ViT-S/16 trains on one core. Under torchrun all
ranks train, and rank 0 records.
"""

import gc
import math
import sys
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from itertools import cycle
from pathlib import Path

import torch

from benchmarks.harness import cli, results
from benchmarks.harness.session import Case, Session
from benchmarks.harness.timing import interleaved_rounds
from benchmarks.train_step import report
from benchmarks.train_step.engines import Training, engine_variants, has_deepspeed, ops_variants
from benchmarks.train_step.measure import Comparison, StepRound, check_losses, compare, record, run_round
from benchmarks.train_step.report import BARE, CACHED, COMPILED, DDP, DEFAULT, LOADING, OPS, REFERENCE, SHARDS, STEP
from benchmarks.train_step.workload import StepWorkload, build_workload
from iwm_fast.kernels.launch import IS_INTERPRETING
from iwm_fast.pipelines.batch import Batch
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo

_LOADER_STEPS = 3
"""Factor on the number of steps per round with a loader, so that the prefetched batches are used up."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections that the command line selects; return the exit status."""
    parser = cli.build_parser("train_step", __doc__, SECTIONS)
    parser.add_argument("--synthetic", action="store_true", help="leave out what reads shards")
    parser.add_argument(
        "--engine", choices=("plain", "deepspeed"), help="compare engines without DeepSpeed, or with it"
    )
    options = parser.parse_args(arguments)
    if options.engine == "deepspeed" and not has_deepspeed():
        print("error: DeepSpeed is not installed; pip install deepspeed, or choose --engine plain", file=sys.stderr)
        return 2
    rank_info = distributed.start("cuda" if torch.cuda.is_available() else "cpu")
    session = cli.open_session(options, results.STEPS)
    if rank_info.rank > 0:
        session.out = None
    workload = build_workload(rank_info.device, options.quick)
    with_deepspeed = options.engine == "deepspeed" or (options.engine is None and has_deepspeed())
    sections = {
        "ops": compare_ops,
        "engines": partial(compare_engines, with_deepspeed=with_deepspeed),
        "loader": partial(compare_loading, folder=options.data, with_deepspeed=with_deepspeed),
    }
    if options.synthetic:
        del sections["loader"]
    try:
        status = cli.run(session, sections, options.only, report, workload, rank_info)
    finally:
        distributed.stop()
    failures = fused_failures(session)
    for name, failure in failures.items():
        print(f"{name} failed: {failure}", file=sys.stderr)
    return status or int(bool(failures))


def fused_failures(session: Session) -> dict[str, str]:
    """Return the error of every training with fused operations that failed, in this run or an earlier one."""
    names = {record.provider: record for record in session.records if record.what == OPS and record.failure}
    # A profile that failed has another name.
    return {name: str(each.failure) for name, each in names.items() if "fused" in name and name in each.shape.values()}


def compare_ops(session: Session, workload: StepWorkload, rank_info: RankInfo) -> None:
    """Time and profile one step after the other, each with another choice of operations or compiled."""
    if rank_info.device.type == "cpu" and not (IS_INTERPRETING and session.quick):
        session.skipped.append("ops: there is no GPU, and kernels are interpreted with --quick only")
        return
    batches: Sequence[Batch] = ()
    for name, variant in ops_variants(workload).items():
        # One case per variant: a run that was cut off continues with the next one.
        case = Case(OPS, workload.shape(1) | {"variant": name}, workload.precision)
        if session.is_measured(case) or not session.has_time(f"{OPS}: {name}"):
            continue
        torch.compiler.reset()
        gc.collect()
        if rank_info.device.type == "cuda":
            torch.cuda.empty_cache()
        # Drawn once, because that takes a core seconds.
        batches = batches or workload.batches(rank_info)
        comparison = compare(
            workload, {name: variant}, rank_info, batches=batches, deadline=session.deadline, is_profiled=True
        )
        record(session, workload, case, comparison, baseline=name, rank_info=rank_info)
    losses = {
        each.provider: each.figures["losses"] for each in session.records if each.what == OPS and not each.failure
    }
    check_losses(losses, REFERENCE, workload.precision)


def compare_engines(
    session: Session, workload: StepWorkload, rank_info: RankInfo, *, with_deepspeed: bool = True
) -> None:
    """Compare all engines with the bare loop on one rank, and with DistributedDataParallel on several."""
    variants = engine_variants(workload, rank_info, with_deepspeed=with_deepspeed)
    if not with_deepspeed:
        session.skipped.append("engines: DeepSpeed")
    is_alone = rank_info.world_size == 1
    case = Case(STEP, workload.shape(rank_info.world_size), workload.precision)
    # Ranks that compare their own clocks could disagree on whether a collective call follows.
    deadline = session.deadline_of(0.8) if is_alone else math.inf
    # An engine that has failed is not tried again, because it may have ended the earlier run.
    failed = session.failures(case)
    untried = {name: variant for name, variant in variants.items() if name not in failed}
    comparison = compare(workload, untried, rank_info, deadline=deadline)
    comparison.failures.update(failed)
    reached = comparison.rounds | comparison.failures
    session.skipped += [f"engines: {name}" for name in variants if name not in reached]
    record(session, workload, case, comparison, baseline=BARE if is_alone else DDP, rank_info=rank_info)
    check_losses(comparison.losses, next(iter(variants)), workload.precision)


def compare_loading(
    session: Session, workload: StepWorkload, rank_info: RankInfo, *, folder: Path, with_deepspeed: bool = True
) -> None:
    """Compare steps on batches that are in memory with steps on batches from the loader."""
    variants = engine_variants(workload, rank_info, with_deepspeed=with_deepspeed)
    name = next(name for name in (DEFAULT + COMPILED, DEFAULT, *variants) if name in variants)
    case = Case(LOADING, workload.shape(1) | {"engine": name}, workload.precision)
    if session.is_measured(case):
        return
    try:
        training = Training(variants[name], workload, rank_info)
        rounds = run_with_both_sources(session, workload, rank_info, training, folder=folder)
    except Exception as error:
        session.record_failure(case, SHARDS, error)
        return
    record(session, workload, case, Comparison(rounds=rounds), baseline=CACHED, rank_info=rank_info)


def run_with_both_sources(
    session: Session, workload: StepWorkload, rank_info: RankInfo, training: Training, *, folder: Path
) -> dict[str, list[StepRound]]:
    """Run rounds of one training run, alternately on batches in memory and on batches from the loader."""
    # Imported here, because the other sections run where no loader is installed.
    from benchmarks.train_step.shards import open_loader  # noqa: PLC0415

    cached = cycle(workload.batches(rank_info))
    training.warm_up(cached, workload.budget.warm_ups)
    rounds: dict[str, list[StepRound]] = {CACHED: [], SHARDS: []}
    loader, prefetched = open_loader(folder, workload, rank_info)
    with closing(loader):
        # The loader prefetches batches during the rounds of the cached batches. They would hide the wait.
        sources = {CACHED: (cached, 0), SHARDS: (loader, prefetched)}
        num_rounds = max(workload.budget.rounds // 2, 1)
        for name in interleaved_rounds(sources, num_rounds, lambda number: session.has_time(f"loader, round {number}")):
            batches, skipped = sources[name]
            steps = _LOADER_STEPS * workload.budget.steps
            rounds[name].append(run_round(training, batches, steps, rank_info, skipped=skipped))
    return rounds


SECTIONS = ("ops", "engines", "loader")

if __name__ == "__main__":
    sys.exit(main())
