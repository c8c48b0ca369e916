"""The first minutes on a GPU: parts that end, go on and report, with the packages that such a machine has."""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.harness import records
from benchmarks.train_step.report import BARE, PLAIN
from fixtures.paths import PROJECT, PYTHONPATH, WORKERS

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="tests the behaviour without a GPU")

SUITE = """
[gw0] [ 25%] PASSED tests/kernels/test_a.py::test_b[3-[1, 2]]
[gw1] [ 50%] FAILED tests/kernels/test_a.py::test_c
[gw1] [ 75%] SKIPPED tests/kernels/test_a.py::test_d
FAILED tests/kernels/test_a.py::test_c - assert 1 == 2
"""


def options(folder, *arguments):
    return gpu_check.parse(["--out", str(folder), *arguments])


@without_gpu
def test_kernels_steps_and_tests_start_without_packages_that_a_gpu_machine_lacks(tmp_path):
    command = [sys.executable, str(WORKERS / "start_without_packages.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    process = subprocess.run(command, env=environment, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert process.returncode == 0 and process.stdout.endswith("started\n"), process.stdout[-3000:] + process.stderr
    (path,) = tmp_path.iterdir()
    assert [each.provider for each in records.read(path)] == [BARE, PLAIN]


@without_gpu
def test_without_a_gpu_only_a_trial_runs(tmp_path, capsys):
    assert gpu_check.main(["--out", str(tmp_path)]) == 2
    assert "there is no GPU on this machine; --quick tries" in capsys.readouterr().err


def test_the_folder_is_that_of_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu_check.parse(["--part", "check,suite"]).out == tmp_path
    assert gpu_check.parse(["--part", "check,suite"]).part == ["check", "suite"]
    with pytest.raises(
        argparse.ArgumentTypeError, match="parts are check, time, step, suite, engine, sweep, loader; got all"
    ):
        gpu_check.parts_of("all")


def test_every_part_ends_before_its_limit_and_writes_into_the_folder(tmp_path):
    for part in gpu_check.PARTS:
        command = gpu_check.command_of(part, options(tmp_path, "--commit", "abc"), 100.0)
        if part not in ("suite", "loader"):
            assert command[command.index("--out") + 1] == str(tmp_path)
            assert float(command[command.index("--limit-s") + 1]) < 100 and command[-2:] == ["--commit", "abc"]


SLEEP = ["sh", "-c", "sleep 30 & echo $!; wait"]
"""A command with a child, whose number it prints."""


def has_ended(log, within_s=10.0):
    """Return whether the process that a log names ends; a zombie has ended."""
    (number,) = log.read_text().split()
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_a_command_over_its_limit_is_stopped_with_its_children(tmp_path):
    log = tmp_path / "x.txt"
    assert gpu_check.run(SLEEP, log, 1.0) == 124
    assert has_ended(log)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_does_not_outlive_what_runs_it(tmp_path, number):
    log, received = tmp_path / "x.txt", []
    before = signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    timer = threading.Timer(1.0, os.kill, (os.getpid(), number))
    try:
        timer.start()
        with pytest.raises((SystemExit, KeyboardInterrupt)):
            gpu_check.run(SLEEP, log, 20.0)
        assert signal.getsignal(signal.SIGTERM) is not before and not received
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)
    assert has_ended(log)


def test_what_a_command_leaves_behind_is_ended_too(tmp_path):
    log = tmp_path / "x.txt"
    assert gpu_check.run(["sh", "-c", "sleep 30 & echo $!"], log, 20.0) == 0
    assert has_ended(log)


@pytest.mark.parametrize(("num_new", "num_runs"), [(0, 1), (1, 2), (9, 5)])
def test_a_part_that_fails_goes_on_while_it_records_something_new(tmp_path, monkeypatch, num_new, num_runs):
    statuses = []

    def run(command, log, limit_s):
        statuses.append(1)
        if len(statuses) <= num_new:
            with (tmp_path / "x.jsonl").open("a") as file:
                file.write("{}\n")
        return 1

    monkeypatch.setattr(gpu_check, "run", run)
    assert gpu_check.run_part("check", options(tmp_path), time.monotonic() + 1000) == 1
    assert len(statuses) == num_runs


def test_all_parts_share_the_total_time(tmp_path, monkeypatch, capsys):
    now, limits = [0.0], {}

    def run(command, log, limit_s):
        limits[log.stem] = limit_s
        now[0] += limit_s
        return 0

    monkeypatch.setattr(gpu_check.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(gpu_check, "run", run)
    arguments = ["--quick", "--out", str(tmp_path), "--commit", "abc", "--total-s", "540"]
    assert gpu_check.main([*arguments, "--part", "check,time,step,suite"]) == 0
    assert limits == {"check": 180.0, "time": 180.0, "step": 180.0}
    printed = capsys.readouterr().out
    assert "| suite | no time |" in printed and printed.count("## Tests") == 4


def test_the_suite_goes_on_with_tests_that_have_not_passed(tmp_path):
    chosen = options(tmp_path, "--commit", "abc")
    gpu_check.log_of("suite", tmp_path).write_text(f"code of the tests: abc\n{SUITE}")
    command = gpu_check.command_of("suite", chosen, 100.0)
    assert [word for word in command if "deselect" in word] == ["--deselect=tests/kernels/test_a.py::test_b[3-[1, 2]]"]
    assert "3 tests, 1 failed\n- tests/kernels/test_a.py::test_c" in gpu_check.summary(chosen)


def test_outcomes_of_other_code_do_not_count(tmp_path, monkeypatch):
    chosen = options(tmp_path, "--part", "suite", "--quick", "--commit", "abc")
    monkeypatch.setattr(gpu_check, "run", lambda command, log, limit_s: 0)
    gpu_check.main(["--out", str(tmp_path), "--part", "suite", "--quick", "--commit", "old"])
    log = gpu_check.log_of("suite", tmp_path)
    log.write_text(log.read_text() + SUITE)
    assert gpu_check.test_outcomes("suite", chosen) == {}
    assert len(gpu_check.test_outcomes("suite", options(tmp_path, "--commit", "old"))) == 3
    assert gpu_check.test_outcomes("suite", options(tmp_path)) == {}


def test_the_suite_leaves_out_pytest_benchmark_and_tests_that_need_no_gpu(tmp_path):
    command = " ".join(gpu_check.command_of("suite", options(tmp_path), 100.0))
    assert " -p no:benchmark " in command and " -m not slow " in command
    assert command.count("--ignore-glob=") == 2


def test_all_parts_run_and_one_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        gpu_check, "command_of", lambda part, *_: ["sh", "-c", f"echo {part} broke; test {part} != time"]
    )
    assert gpu_check.main(["--quick", "--out", str(tmp_path), "--part", "check,time,step"]) == 1
    printed = capsys.readouterr().out
    assert printed.endswith("| time  | status 1 |  0 s |\n| step  | ok       |  0 s |\n") and "| check | ok " in printed
    assert "\ntime broke\n" in printed and "\nstep broke\n" not in printed
