"""Time the fused operations beside everything they compete with: `python -m benchmarks.kernels --help`.

Without a GPU, or with `--only offline`: what the compiler makes of every launch, tile waste and floors. With one:
times, the fused results checked first; a wrong one ends the run with status 1.
"""

import argparse
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.harness import cli, machine, records, results, timing
from benchmarks.harness.goals import goal_table
from benchmarks.harness.session import Session
from benchmarks.kernels import attention, compiler_report, conditioning, predictor, report, residual_norm, tile_sweep

SECTIONS: dict[str, Callable[[Session], None]] = {
    "attention": attention.run,
    "conditioning": conditioning.run,
    "norm": residual_norm.run,
    "predictor": predictor.run,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; return the exit status."""
    options = parse(arguments)
    has_gpu = torch.cuda.is_available()
    if options.sweep and not has_gpu:
        print("error: --sweep times kernels and there is no GPU here", file=sys.stderr)
        return 2
    try:
        compiler_report.check_compilable()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # a GPU's time is dear, and these figures are the same anywhere
    if options.only == "offline" or not has_gpu:
        offline(options)
    if options.only == "offline":
        return 0
    if has_gpu:
        return measured(options)
    print("\nThere is no GPU here: times are those committed. Of the goals:\n")
    print(goal_table(report.GOALS, records.latest(results.newest_gpu(results.committed_kernels()))))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.parser("kernels", __doc__, [*SECTIONS, "offline"], suffix="", needs_data=False)
    parser.add_argument("--without", nargs="+", default=[], help="leave out providers whose names contain one of these")
    parser.add_argument("--sweep", action="store_true", help="time other settings of the attention tables instead")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=compiler_report.ARCHITECTURES, default=[90], help="compile offline for"
    )
    parser.add_argument("--write", action="store_true", help=f"write the offline figures to {results.OFFLINE.name}")
    return parser.parse_args(arguments)


def offline(options: argparse.Namespace) -> None:
    """Compile every launch, and print and maybe write what came of it."""
    out = results.OFFLINE if options.write else None
    if out is not None:
        out.unlink(missing_ok=True)
    session = Session(machine.describe(options.commit), effort=timing.QUICK, device="meta", out=out)
    compiler_report.measure(session, options.arch)
    print(f"\n{compiler_report.sections(session.records, options.arch)}")


def measured(options: argparse.Namespace) -> int:
    """Measure on the GPU."""
    suffix = "-sweep" if options.sweep else ""
    # what else the machine has makes no difference to kernels
    options.out = options.out or results.RESULTS / f"{machine.slug(torch.cuda.get_device_name())}{suffix}.jsonl"
    session = cli.open_session(options, suffix=suffix, without=options.without)
    session.machine["copy_bytes_per_s"] = timing.copy_bandwidth("cuda", effort=session.effort)
    session.machine["matrix_flops_per_s"] = timing.matrix_rate("cuda", effort=session.effort)
    if options.sweep:
        return cli.run_and_report(session, lambda: tile_sweep.run(session), tile_sweep.table)
    return cli.run_and_report(
        session,
        lambda: cli.run_sections(session, SECTIONS, options.only),
        lambda found: report.sections(found, level="##"),
    )


if __name__ == "__main__":
    sys.exit(main())
