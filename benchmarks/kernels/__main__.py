"""Check the fused operations and time them beside their alternatives: `python -m benchmarks.kernels --help`.

All results are checked before they are timed; a wrong one is not timed, and the status is then 1. Without a GPU, or
with `--only offline`, the compiler's figures for all launches, tile waste and rooflines are printed. Without a GPU and
with TRITON_INTERPRET=1 tiny shapes run in Triton's interpreter, which tests the benchmark itself.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torch

from benchmarks.harness import cli, machine, records, results, timing
from benchmarks.harness.goals import goal_table
from benchmarks.harness.session import Session
from benchmarks.kernels import attention, compiler_report, conditioning, report, residual_norm, tile_sweep
from iwm_fast.kernels.launch import IS_INTERPRETING


def check(session: Session) -> None:
    """Check all operations against float64 in both half precisions."""
    for module in (attention, residual_norm, conditioning):
        module.check(session)


SECTIONS: dict[str, Callable[[Session], None]] = {
    "check": check,
    "attention": attention.run,
    "norm": residual_norm.run,
    "conditioning": conditioning.run,
    "sweep": tile_sweep.run,
}
DEFAULT = ("check", "attention", "norm", "conditioning")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the sections that the command line selects; return the exit status."""
    options = parse(arguments)
    has_gpu = torch.cuda.is_available()
    if options.only == ["offline"] or not (has_gpu or IS_INTERPRETING):
        return report_offline(options)
    # Poisoned memory needs PyTorch's deterministic mode, and that needs this before CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    session = cli.open_session(options, results.KERNELS)
    session.excluded = options.without
    if not has_gpu:
        # In few rows, one ReLU that rounding turns off or on is a large error. A fixed seed has none.
        torch.manual_seed(0)
        session.budget, session.quick, session.excluded = timing.TRIAL, True, [*options.without, "compiled"]
        # Times of the interpreter are no results.
        session.out = None if options.out == results.RESULTS else session.out
    else:
        session.machine["copy_bytes_per_s"] = timing.copy_bandwidth("cuda", budget=session.budget)
        session.machine["matrix_flops_per_s"] = timing.matrix_rate("cuda", budget=session.budget)
    return cli.run(session, SECTIONS, options.only or DEFAULT, report)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = cli.build_parser("kernels", __doc__, [*SECTIONS, "offline"], needs_data=False)
    parser.add_argument("--without", nargs="+", default=[], help="skip providers whose names contain any of these")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=compiler_report.ARCHITECTURES, default=[90], help="for offline figures"
    )
    parser.add_argument("--write", action="store_true", help="write the offline figures to benchmarks/results")
    return parser.parse_args(arguments)


def report_offline(options: argparse.Namespace) -> int:
    """Compile all launches, print the figures, and with --write record them; return the exit status."""
    if IS_INTERPRETING:
        # Triton has read the variable when kernels were decorated, and compiles nothing.
        print("error: TRITON_INTERPRET is set, so Triton interprets all kernels; unset it", file=sys.stderr)
        return 2
    description = machine.describe(options.commit)
    out = results.offline(description["triton"]) if options.write else None
    if out is not None:
        out.unlink(missing_ok=True)
    session = Session(description, budget=timing.QUICK, device="meta", out=out)
    compiler_report.measure(session, options.arch)
    print(f"\n{compiler_report.sections(session.records, options.arch)}")
    if not torch.cuda.is_available():
        print("\nThere is no GPU on this machine; the goals beside the committed times:\n")
        print(goal_table(report.GOALS, records.latest(results.read(results.KERNELS))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
