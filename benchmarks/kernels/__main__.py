"""Time the fused operations beside everything they compete with: `python -m benchmarks.kernels --help`.

Without a GPU, or with `--only offline`: what the compiler makes of every launch, tile waste and floors. With one:
times, the fused results checked first; a wrong one ends the run with status 1.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.harness import goals, machine, results, tables, timing
from benchmarks.harness import records as lines
from benchmarks.harness.records import Record
from benchmarks.harness.session import Session, WrongResultError
from benchmarks.kernels import attention, compiler_report, conditioning, predictor, residual_norm, tile_sweep

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
    print_goals(results.newest_gpu(results.committed_kernels()))
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("--only", choices=[*SECTIONS, "offline"], help="one section instead of all")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and repeats")
    parser.add_argument("--limit-s", type=float, default=1e9, help="start nothing new after so many seconds")
    parser.add_argument("--out", type=Path, help="append here; default benchmarks/results/<GPU>.jsonl")
    parser.add_argument("--commit", help="what was measured, where there is no git to ask")
    parser.add_argument("--without", nargs="+", default=[], help="leave out providers whose names contain one of these")
    parser.add_argument("--sweep", action="store_true", help="time other settings of the attention tables instead")
    parser.add_argument(
        "--arch", type=int, nargs="+", choices=compiler_report.ARCHITECTURES, default=[90], help="compile offline for"
    )
    parser.add_argument("--write", action="store_true", help=f"write the offline figures to {results.OFFLINE.name}")
    return parser.parse_args(arguments)


def offline(options: argparse.Namespace) -> None:
    """Compile every launch, and print and maybe write what came of it."""
    about = machine.describe(options.commit)
    if options.write:
        results.OFFLINE.unlink(missing_ok=True)
    found = []
    for record in compiler_report.measure(options.arch, about):
        found.append(record)
        if options.write:
            lines.append(results.OFFLINE, record)
    for arch in options.arch:
        for module in compiler_report.MODULES:
            print(f"\n## {module} on sm_{arch}\n\n{compiler_report.launch_table(found, arch, module)}")
        print(f"\n## Scores computed per score needed, sm_{arch}\n\n{compiler_report.waste_table(found, arch)}")
        print(f"\n{compiler_report.binaries_line(found, arch)}")
    print("\n## Floors at an H200's 4.3 TB/s and 790 TFLOP/s; measured times come from a GPU only\n")
    print(compiler_report.floor_table(found))


def measured(options: argparse.Namespace) -> int:
    """Measure on the GPU."""
    effort = timing.QUICK if options.quick else timing.FULL
    about = machine.describe(options.commit)
    name = machine.slug(str(about["gpu"])) + ("-sweep" if options.sweep else "")
    out = options.out or results.RESULTS / f"{name}.jsonl"
    session = Session(about, effort=effort, device="cuda", out=out, limit_s=options.limit_s, without=options.without)
    about["copy_bytes_per_s"] = timing.copy_bandwidth("cuda", effort=effort)
    about["matrix_flops_per_s"] = timing.matrix_rate("cuda", effort=effort)
    print(machine.machine_line(about))
    status = 0
    try:
        if options.sweep:
            tile_sweep.run(session)
        for name, section in {} if options.sweep else SECTIONS.items():
            if options.only in (None, name):
                section(session)
    except WrongResultError as error:
        print(f"\nwrong result: {error}", file=sys.stderr)
        status = 1
    if options.sweep:
        print(f"\n{tile_sweep.table(session.records)}")
    else:
        print_measured(session)
    print(f"\nwritten to {out}")
    return status


def print_measured(session: Session) -> None:
    """Print a table per task, what raised or was left out, and last the goals."""
    what = [name for name in dict.fromkeys(record.what for record in session.records) if not name.endswith(" error")]
    for name in what:
        found = [record for record in session.records if record.what == name]
        print(f"\n## {name}: median ms (share of the time its bytes take)\n\n{tables.section(name, found)}")
    checks = [record for record in session.records if record.what.endswith(" error")]
    if checks:
        print(f"\n## Relative errors to float64, of the output and of the worst\n\n{tables.errors(checks)}")
    for line in tables.failures(session.records):
        print(f"raised: {line}")
    for label in session.left_out:
        print(f"left out for lack of time: {label}")
    print()
    print_goals(session.records)


def print_goals(records: Sequence[Record]) -> None:
    """Print what was to be reached beside what was."""
    print(tables.table(["goal", "pass", "wanted", "measured", "met"], goals.rows(lines.latest(records))))


if __name__ == "__main__":
    sys.exit(main())
