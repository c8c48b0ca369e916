"""What to run first on a GPU: `python -m benchmarks.gpu_check --part check,time --out FOLDER`.

    check     every kernel against float64, at freshly drawn lengths, in both half precisions
    time      every operation beside cuDNN, FlashAttention 2, varlen_attn, eager and compiled PyTorch
    step      a training step with PyTorch's operations and with fused ones, eager and compiled, with a profile
    suite     the tests of kernels that need a GPU
    engine    DeepSpeed ZeRO-1 beside the plain engine
    sweep     candidates for the attention tables
    loader    the tests of the data pipeline that need a GPU; a decoder that crashes fails one of them

Each part is a process of its own, and all parts together end within --total-s. Results are written line by line into
the folder; run again with the same folder and the same code, the command measures only what is missing. Where the
folder is emptied before each command, keep a copy:

    mkdir -p ~/kept; cp -r ~/kept/. $OUT; trap 'cp -r $OUT/. ~/kept' EXIT; python3 -m benchmarks.gpu_check

A wrong kernel is reported and not timed; it does not stop the rest. One that makes the GPU unusable ends its part,
which is started again with the next measurement. Without a GPU, --quick runs the parts on tiny shapes, the kernels
in Triton's interpreter.
"""

import argparse
import contextlib
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks.harness import machine, records, results, tables
from benchmarks.kernels import report as kernels_report
from benchmarks.train_step import report as train_step_report

PROJECT = Path(__file__).parent.parent
# pytest-benchmark warns under pytest-xdist, and warnings are errors. A worker of pytest-xdist that crashes is replaced.
_PYTEST = ("pytest", "-v", "-p", "no:benchmark", "-m")
PARTS = {
    "check": ("benchmarks.kernels", "--only", "check"),
    "time": ("benchmarks.kernels", "--only", "attention", "norm", "conditioning"),
    "step": ("benchmarks.train_step", "--synthetic", "--only", "ops"),
    # Slow tests compile for other GPUs.
    "suite": (*_PYTEST, "not slow", "--ignore-glob=*/test_reference.py", "--ignore-glob=*/test_offline_compile.py",
              "tests/kernels"),
    "engine": ("benchmarks.train_step", "--synthetic", "--only", "engines"),
    "sweep": ("benchmarks.kernels", "--only", "sweep"),
    "loader": (*_PYTEST, "gpu", "tests/pipelines"),
}  # fmt: skip
"""Module and arguments of each part."""
_SUITES = ("suite", "loader")
"""Parts that are tests."""
_LIMITS_S = {"check": 180.0, "time": 180.0}
"""Time limits of single parts; others may take what is left."""
_RESTARTS = 4
"""How often a part that fails is started again, if it has recorded something new."""
_RESULT = re.compile(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR|SKIPPED) (tests/.*?)\s*$", re.MULTILINE)
"""A line of pytest-xdist about one test."""
_VERSION = re.compile(r"^code of the tests: (.*)$", re.MULTILINE)
"""A line before the output of each run of the suite."""
_GRACE_S = 45.0
"""Seconds before a part is ended in which it starts no new measurement. With less than twice that left, none starts."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print tables after each of them; return 1 if one failed."""
    options = parse(arguments)
    if not (torch.cuda.is_available() or options.quick):
        print("error: there is no GPU on this machine; --quick tries the command without one", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes, deadline, has_failed = [], time.monotonic() + options.total_s, False
    for part in options.part:
        begin = time.monotonic()
        status = run_part(part, options, min(deadline, begin + _LIMITS_S.get(part, math.inf)))
        outcome = "no time" if status is None else f"status {status}" if status else "ok"
        outcomes.append([part, outcome, f"{time.monotonic() - begin:.0f} s"])
        if status:
            has_failed = True
            print("\n".join(log_of(part, options.out).read_text(errors="replace").splitlines()[-15:]))
        # Every time, because this command may be ended before the next part is complete.
        print(f"\n{summary(options)}\n\n{tables.table(['part', 'outcome', 'time'], outcomes)}", flush=True)
    return int(has_failed)


def run_part(part: str, options: argparse.Namespace, deadline: float) -> int | None:
    """Run a part until a time of the monotonic clock; return its last status, or None if there was no time.

    A CUDA error can end the process of a part. The measurement that caused it is recorded as failed, and the part
    continues with the next one.
    """
    status = None
    for _ in range(1 + _RESTARTS):
        limit_s, recorded = deadline - time.monotonic(), num_records(options.out)
        if limit_s < 2 * _GRACE_S:
            break
        log = log_of(part, options.out)
        if part in _SUITES:
            with log.open("a", encoding="utf-8") as file:
                # The run before may have been stopped within a line.
                file.write(f"\ncode of the tests: {tests_version(options)}\n")
        status = run(command_of(part, options, limit_s), log, limit_s)
        if status == 0 or num_records(options.out) == recorded:
            break
    return status


def num_records(folder: Path) -> int:
    """Return the number of records in a folder of results."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "check,time,step,suite,engine"
    parser.add_argument("--part", type=parts_of, default=default, help="parts, with commas between")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), required="OUT" not in os.environ)
    parser.add_argument("--total-s", type=float, default=540.0, help="time limit of all parts together")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter measurements")
    parser.add_argument("--commit", help="commit to record instead of git's, or of a hash of the sources")
    return parser.parse_args(arguments)


def parts_of(text: str) -> list[str]:
    """Return the parts that a list names."""
    parts = text.split(",")
    if not PARTS.keys() >= set(parts):
        raise argparse.ArgumentTypeError(f"parts are {', '.join(PARTS)}; got {text}")
    return parts


def command_of(part: str, options: argparse.Namespace, limit_s: float) -> list[str]:
    """Return the command of a part that is ended after `limit_s`."""
    command = [sys.executable, "-m", *PARTS[part]]
    if part in _SUITES:
        # A process compiles its kernels one after the other. Loaders take the memory of several tests.
        is_single = options.quick or part == "loader"
        command += ["-n", "1" if is_single else str(min(8, os.cpu_count() or 1))]
        command += ["-k", "launches"] * (options.quick and part == "suite")
        outcomes = test_outcomes(part, options).items()
        return [*command, *(f"--deselect={name}" for name, outcome in outcomes if outcome == "PASSED")]
    command += ["--out", str(options.out), "--limit-s", str(limit_s - _GRACE_S)]
    command += ["--quick"] * options.quick + (["--commit", options.commit] if options.commit else [])
    return command


def log_of(part: str, folder: Path) -> Path:
    """Return the file that holds what a part prints."""
    return folder / f"{part}.txt"


def run(command: list[str], log: Path, limit_s: float) -> int:
    """Run a command in the project's folder, append what it prints to a file, and return its status, 124 for late.

    Whatever ends this function, SIGTERM included, also ends the command and its children: they would disturb what is
    timed next.
    """
    print(f"$ {' '.join(command)[:500]}", flush=True)
    # Triton reads the variable when kernels are imported, so a process of its own has to have it.
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = os.environ | interpret | {"PYTHONUNBUFFERED": "1"}
    with log.open("a", encoding="utf-8") as file, _ended_by_sigterm():
        process = subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdout=file, stderr=subprocess.STDOUT, process_group=0
        )
        try:
            status = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = 124
        finally:
            # The process group, because pytest has workers.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    # Pytest exits with 5 if every test is deselected.
    return 0 if "pytest" in command and status == 5 else status


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def tests_version(options: argparse.Namespace) -> str:
    """Return the commit, or a hash of the sources, that outcomes of tests belong to."""
    return options.commit or machine.source_version("tests")


def test_outcomes(part: str, options: argparse.Namespace) -> dict[str, str]:
    """Return the last outcome of every test of a part, of runs of this version of the code."""
    path = log_of(part, options.out)
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    _, *parts = _VERSION.split(text)
    version = tests_version(options)
    same = [output for name, output in zip(parts[::2], parts[1::2], strict=True) if name == version]
    return {name: outcome for outcome, name in _RESULT.findall("\n".join(same))}


def summary(options: argparse.Namespace) -> str:
    """Return the tables of everything in the folder of results."""
    folder = options.out
    reports = {results.KERNELS: kernels_report, results.STEPS: train_step_report}
    texts = [report.sections(records.latest(results.read(suffix, folder)), "##") for suffix, report in reports.items()]
    outcomes = {name: outcome for part in _SUITES for name, outcome in test_outcomes(part, options).items()}
    bad = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    texts.append("\n".join([f"## Tests\n\n{len(outcomes)} tests, {len(bad)} failed", *(f"- {name}" for name in bad)]))
    return "\n\n".join(texts)


if __name__ == "__main__":
    sys.exit(main())
