"""Time the fused operations beside their alternatives: `python -m benchmarks.kernels --help`.

On a GPU all results are checked before they are timed, and a wrong one ends the run with status 1. Without a GPU, or
with `--only offline`, the command reports the compiler's figures for all launches, tile waste and rooflines.
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
    """Run the sections that the command line selects; return the exit status."""
    options = parse(arguments)
    has_gpu = torch.cuda.is_available()
    if options.sweep and not has_gpu:
        print("error: --sweep needs a GPU, but there is none on this machine", file=sys.stderr)
        return 2
    try:
        compiler_report.require_compiler()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # GPU time is expensive, and these figures are the same on any machine.
    if options.only == "offline" or not has_gpu:
        report_offline(options)
    if options.only == "offline":
        return 0
    if has_gpu:
        return measure_on_gpu(options)
    print("\nThere is no GPU on this machine; the goals beside the committed times:\n")
    print(goal_table(report.GOALS, records.latest(results.newest_gpu(results.read_committed_kernels()))))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.build_parser("kernels", __doc__, [*SECTIONS, "offline"], suffix="", needs_data=False)
    parser.add_argument("--without", nargs="+", default=[], help="skip providers whose names contain any of these")
    parser.add_argument("--sweep", action="store_true", help="time candidates for the attention tables instead")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=compiler_report.ARCHITECTURES, default=[90], help="for offline figures"
    )
    parser.add_argument("--write", action="store_true", help=f"write the offline figures to {results.OFFLINE.name}")
    return parser.parse_args(arguments)


def report_offline(options: argparse.Namespace) -> None:
    """Compile all launches, print the figures, and with --write record them."""
    out = results.OFFLINE if options.write else None
    if out is not None:
        out.unlink(missing_ok=True)
    session = Session(machine.describe(options.commit), budget=timing.QUICK, device="meta", out=out)
    compiler_report.measure(session, options.arch)
    print(f"\n{compiler_report.sections(session.records, options.arch)}")


def measure_on_gpu(options: argparse.Namespace) -> int:
    """Measure on the GPU; return the exit status."""
    suffix = "-sweep" if options.sweep else ""
    # The CPU hardly matters for kernels, so the file is named after the GPU alone.
    options.out = options.out or results.RESULTS / f"{machine.slug(torch.cuda.get_device_name())}{suffix}.jsonl"
    session = cli.open_session(options, suffix=suffix, excluded=options.without)
    session.machine["copy_bytes_per_s"] = timing.copy_bandwidth("cuda", budget=session.budget)
    session.machine["matrix_flops_per_s"] = timing.matrix_rate("cuda", budget=session.budget)
    if options.sweep:
        return cli.run_and_report(session, lambda: tile_sweep.run(session), tile_sweep.table)
    return cli.run_and_report(
        session,
        lambda: cli.run_sections(session, SECTIONS, options.only),
        lambda records: report.sections(records, level="##"),
    )


if __name__ == "__main__":
    sys.exit(main())
