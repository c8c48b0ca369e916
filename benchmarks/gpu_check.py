"""What to run first on a GPU: `python -m benchmarks.gpu_check --part check,time --out FOLDER`.

    check     every kernel against float64, at freshly drawn lengths, in both half precisions
    time      every operation beside cuDNN, FlashAttention 2, varlen_attn, eager and compiled PyTorch
    step      a training step with PyTorch's operations and with fused ones, eager and compiled, with a profile
    suite     pytest tests/kernels
    engine    DeepSpeed ZeRO-1 beside the plain engine
    sweep     candidates for the attention tables

Each part is a process of its own and ends within --limit-s. Results are written line by line into the folder; run
again with the same folder and the same code, the command measures only what is missing. Where the folder is emptied
before each command, keep a copy:

    mkdir -p ~/kept; cp -r ~/kept/. $OUT; python -m benchmarks.gpu_check; cp -r $OUT/. ~/kept

A wrong kernel is reported and not timed; it does not stop the rest. One that makes the GPU unusable ends its part; run
again, the part goes on with what follows. Without a GPU, --quick runs all parts on tiny shapes, the kernels in Triton's
interpreter.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness import machine, records, results, tables
from benchmarks.kernels import report as kernels_report
from benchmarks.train_step import report as train_step_report

PROJECT = Path(__file__).parent.parent
PARTS = {
    "check": ("benchmarks.kernels", "--only", "check"),
    "time": ("benchmarks.kernels", "--only", "attention", "norm", "conditioning"),
    "step": ("benchmarks.train_step", "--synthetic", "--only", "ops"),
    # pytest-benchmark warns under pytest-xdist, and warnings are errors. Slow tests compile for other GPUs.
    "suite": ("pytest", "-v", "-p", "no:benchmark", "-m", "not slow", "tests/kernels"),
    "engine": ("benchmarks.train_step", "--synthetic", "--only", "engines"),
    "sweep": ("benchmarks.kernels", "--only", "sweep"),
}
"""Module and arguments of each part."""
_RESULT = re.compile(r"^\[gw\d+\].*? (PASSED|FAILED|ERROR|SKIPPED) (tests/.*?)\s*$", re.MULTILINE)
"""A line of pytest-xdist about one test."""
_VERSION = re.compile(r"^code of the tests: (.*)$", re.MULTILINE)
"""A line before the output of each run of the suite."""
_GRACE_S = 45.0
"""Seconds before a part is ended in which it starts no new measurement."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts and print one table; return 1 if one of them failed."""
    options = parse(arguments)
    if not (torch.cuda.is_available() or options.quick):
        print("error: there is no GPU on this machine; --quick tries the command without one", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for part in options.part:
        begin = time.monotonic()
        if part == "suite":
            with log_of(part, options.out).open("a", encoding="utf-8") as file:
                # The run before may have been stopped within a line.
                file.write(f"\ncode of the tests: {tests_version(options)}\n")
        status = run(command_of(part, options), log_of(part, options.out), options.limit_s)
        outcomes.append([part, "ok" if status == 0 else f"status {status}", f"{time.monotonic() - begin:.0f} s"])
        if status != 0:
            print("\n".join(log_of(part, options.out).read_text(errors="replace").splitlines()[-15:]), flush=True)
    print(f"\n{summary(options)}\n\n{tables.table(['part', 'outcome', 'time'], outcomes)}")
    return int(any(outcome != "ok" for _, outcome, _ in outcomes))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "check,time,step,suite,engine"
    parser.add_argument("--part", type=parts_of, default=default, help="parts, with commas between")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT"), required="OUT" not in os.environ)
    parser.add_argument("--limit-s", type=float, default=480.0, help="time limit of each part")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter measurements")
    parser.add_argument("--commit", help="commit to record instead of git's, or of a hash of the sources")
    return parser.parse_args(arguments)


def parts_of(text: str) -> list[str]:
    """Return the parts that a list names."""
    parts = text.split(",")
    if not PARTS.keys() >= set(parts):
        raise argparse.ArgumentTypeError(f"parts are {', '.join(PARTS)}; got {text}")
    return parts


def command_of(part: str, options: argparse.Namespace) -> list[str]:
    """Return the command of a part."""
    command = [sys.executable, "-m", *PARTS[part]]
    if part == "suite":
        # A process compiles its kernels one after the other.
        command += ["-n", "1", "-k", "launches"] if options.quick else ["-n", str(min(8, os.cpu_count() or 1))]
        outcomes = test_outcomes(options).items()
        return [*command, *(f"--deselect={name}" for name, outcome in outcomes if outcome == "PASSED")]
    command += ["--out", str(options.out), "--limit-s", str(options.limit_s - _GRACE_S)]
    command += ["--quick"] * options.quick + (["--commit", options.commit] if options.commit else [])
    return command


def log_of(part: str, folder: Path) -> Path:
    """Return the file that holds what a part prints."""
    return folder / f"{part}.txt"


def run(command: list[str], log: Path, limit_s: float) -> int:
    """Run a command in the project's folder, append what it prints to a file, and return its status, 124 for late."""
    print(f"$ {' '.join(command)[:500]}", flush=True)
    # Triton reads the variable when kernels are imported, so a process of its own has to have it.
    interpret = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = os.environ | interpret | {"PYTHONUNBUFFERED": "1"}
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            # The process group, because pytest has workers.
            os.killpg(process.pid, 9)
            process.wait()
            status = 124
    # Pytest exits with 5 if every test is deselected.
    return 0 if "pytest" in command and status == 5 else status


def tests_version(options: argparse.Namespace) -> str:
    """Return the commit, or a hash of the sources, that outcomes of tests belong to."""
    return options.commit or machine.source_version("tests")


def test_outcomes(options: argparse.Namespace) -> dict[str, str]:
    """Return the last outcome of every test of the suite, of runs of this version of the code."""
    path = log_of("suite", options.out)
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
    outcomes = test_outcomes(options)
    bad = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    texts.append("\n".join([f"## Tests\n\n{len(outcomes)} tests, {len(bad)} failed", *(f"- {name}" for name in bad)]))
    return "\n\n".join(texts)


if __name__ == "__main__":
    sys.exit(main())
