"""One command for a machine with a GPU: tests first, then every timing: `python -m benchmarks.gpu_check --help`.

A red test ends it, because times of wrong results mean nothing. The fused operations come first, then the data line,
then the training step in what is left of the time. What follows `--` goes to benchmarks.kernels.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

PROJECT = Path(__file__).parent.parent
TESTS = (("-m", "gpu"), ("tests/kernels",))
"""Arguments of pytest, a process each: with a GPU, `tests/kernels` compiles what it interprets elsewhere."""
_LEAST_BENCH_S, _MARGIN_S = 30.0, 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run tests and benchmarks; return the exit status."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("error: there is no GPU here; offline figures: python -m benchmarks.kernels", file=sys.stderr)
        return 2
    deadline = time.monotonic() + options.limit_s
    red = 0
    for tests in () if options.skip_tests else TESTS:
        # pytest's -x: the first failure decides already
        command = [sys.executable, "-m", "pytest", "-q", *([] if options.keep_going else ["-x"]), *tests]
        status = run(command, min(options.tests_limit_s, deadline - time.monotonic()))
        # 5: nothing was selected
        if status not in (0, 5):
            red = status
            print(f"red: {' '.join(command[1:])}", file=sys.stderr)
            if not options.keep_going:
                return red
    left_s = deadline - time.monotonic()
    pipelines_s, steps_s = min(options.pipelines_limit_s, left_s / 3), min(options.steps_limit_s, left_s / 3)
    commit = commit_of(options.bench)
    statuses = [
        bench("kernels", left_s - pipelines_s - steps_s, options.bench),
        bench("pipelines", deadline - time.monotonic() - steps_s, commit),
        bench("train_step", deadline - time.monotonic(), commit),
    ]
    return next((status for status in statuses if status), red)


def bench(name: str, left_s: float, arguments: list[str]) -> int:
    """Run one of the benchmarks so that it ends by itself; return its status."""
    if left_s < _LEAST_BENCH_S:
        print(f"no time is left for {name}; raise --limit-s", file=sys.stderr)
        return 1
    # what has begun is finished after the limit
    limit_s = max(left_s - _MARGIN_S, _LEAST_BENCH_S)
    return run([sys.executable, "-m", f"benchmarks.{name}", "--limit-s", f"{limit_s:.0f}", *arguments], left_s)


def commit_of(arguments: Sequence[str]) -> list[str]:
    """Return what of the options of benchmarks.kernels holds for the others too: what is measured."""
    place = arguments.index("--commit") if "--commit" in arguments else len(arguments)
    return list(arguments[place : place + 2])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--limit-s", type=float, default=1800.0, help="for everything")
    parser.add_argument("--tests-limit-s", type=float, default=600.0, help="for each of the two runs of pytest")
    parser.add_argument(
        "--pipelines-limit-s", type=float, default=600.0, help="kept for the data line, a third of what is left at most"
    )
    parser.add_argument("--steps-limit-s", type=float, default=450.0, help="the same for the training step")
    parser.add_argument("--keep-going", action="store_true", help="time even what is red")
    parser.add_argument("--skip-tests", action="store_true", help="time only")
    parser.add_argument("bench", nargs="*", metavar="-- ...", help="options of benchmarks.kernels")
    return parser.parse_args(arguments)


def run(command: list[str], limit_s: float) -> int:
    """Run a command in the project; return its status, 124 if it took too long."""
    print(f"$ {' '.join(command)}", flush=True)
    try:
        return subprocess.run(command, cwd=PROJECT, timeout=max(limit_s, 0.0), check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"stopped after {limit_s:.0f} s", file=sys.stderr)
        return 124


if __name__ == "__main__":
    sys.exit(main())
