"""Run the tests and then all timings on a machine with a GPU: `python -m benchmarks.gpu_check --help`.

A failing test ends the run, because times of wrong results mean nothing. The order is fused operations, data pipeline,
and the training step in the remaining time. Arguments after `--` are passed to benchmarks.kernels.
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
"""Arguments of the two pytest processes: with a GPU, `tests/kernels` compiles kernels instead of interpreting them."""
_MIN_BENCHMARK_S, _MARGIN_S = 30.0, 60.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run tests and benchmarks; return the exit status."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        print(
            "error: this command needs a GPU, but there is none on this machine; try python -m benchmarks.kernels",
            file=sys.stderr,
        )
        return 2
    deadline = time.monotonic() + options.limit_s
    test_status = 0
    for tests in () if options.skip_tests else TESTS:
        command = [sys.executable, "-m", "pytest", "-q", *([] if options.keep_going else ["-x"]), *tests]
        status = run(command, min(options.tests_limit_s, deadline - time.monotonic()))
        # Pytest exits with 5 if it selected no test.
        if status not in (0, 5):
            test_status = status
            print(f"failed: {' '.join(command[1:])}", file=sys.stderr)
            if not options.keep_going:
                return test_status
    remaining_s = deadline - time.monotonic()
    pipelines_s, steps_s = min(options.pipelines_limit_s, remaining_s / 3), min(options.steps_limit_s, remaining_s / 3)
    commit = commit_option(options.bench)
    statuses = [
        run_benchmark("kernels", remaining_s - pipelines_s - steps_s, options.bench),
        run_benchmark("pipelines", deadline - time.monotonic() - steps_s, commit),
        run_benchmark("train_step", deadline - time.monotonic(), commit),
    ]
    return next((status for status in statuses if status), test_status)


def run_benchmark(name: str, remaining_s: float, arguments: list[str]) -> int:
    """Run a benchmark with a time limit of its own below the remaining time; return its exit status."""
    if remaining_s < _MIN_BENCHMARK_S:
        print(f"no time is left for {name}; increase --limit-s", file=sys.stderr)
        return 1
    # A measurement that has started is completed after the benchmark's own limit.
    limit_s = max(remaining_s - _MARGIN_S, _MIN_BENCHMARK_S)
    return run([sys.executable, "-m", f"benchmarks.{name}", "--limit-s", f"{limit_s:.0f}", *arguments], remaining_s)


def commit_option(arguments: Sequence[str]) -> list[str]:
    """Return the option --commit of benchmarks.kernels, which the other benchmarks need, too."""
    start = arguments.index("--commit") if "--commit" in arguments else len(arguments)
    return list(arguments[start : start + 2])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    share = "at most a third of what the tests leave"
    parser.add_argument("--limit-s", type=float, default=1800.0, help="total time limit in seconds")
    parser.add_argument("--tests-limit-s", type=float, default=600.0, help="limit of each of the two pytest processes")
    parser.add_argument("--pipelines-limit-s", type=float, default=600.0, help=f"kept for the data pipeline, {share}")
    parser.add_argument("--steps-limit-s", type=float, default=450.0, help=f"kept for the training step, {share}")
    parser.add_argument("--keep-going", action="store_true", help="time even if tests fail")
    parser.add_argument("--skip-tests", action="store_true", help="run no tests")
    parser.add_argument("bench", nargs="*", metavar="-- ...", help="options of benchmarks.kernels")
    return parser.parse_args(arguments)


def run(command: list[str], limit_s: float) -> int:
    """Run a command in the project folder; return its exit status, or 124 after a timeout."""
    print(f"$ {' '.join(command)}", flush=True)
    try:
        return subprocess.run(command, cwd=PROJECT, timeout=max(limit_s, 0.0), check=False).returncode
    except subprocess.TimeoutExpired:
        print(f"timed out after {limit_s:.0f} s", file=sys.stderr)
        return 124


if __name__ == "__main__":
    sys.exit(main())
