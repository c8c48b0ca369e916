"""The first minutes on a GPU: parts that end, go on and report, with the packages that such a machine has."""

import argparse
import os
import subprocess
import sys

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
    with pytest.raises(argparse.ArgumentTypeError, match="parts are check, time, step, suite, engine, sweep; got all"):
        gpu_check.parts_of("all")


def test_every_part_ends_before_its_limit_and_writes_into_the_folder(tmp_path):
    for part in gpu_check.PARTS:
        command = gpu_check.command_of(part, options(tmp_path, "--limit-s", "100", "--commit", "abc"))
        if part != "suite":
            assert command[command.index("--out") + 1] == str(tmp_path)
            assert float(command[command.index("--limit-s") + 1]) < 100 and command[-2:] == ["--commit", "abc"]


def test_a_command_over_its_limit_is_stopped_with_its_children(tmp_path):
    log = tmp_path / "x.txt"
    assert gpu_check.run(["sh", "-c", "echo begun; sleep 30 & wait"], log, 1.0) == 124
    assert log.read_text() == "begun\n"


def test_the_suite_goes_on_with_tests_that_have_not_passed(tmp_path):
    chosen = options(tmp_path, "--commit", "abc")
    gpu_check.log_of("suite", tmp_path).write_text(f"code of the tests: abc\n{SUITE}")
    command = gpu_check.command_of("suite", chosen)
    assert [word for word in command if "deselect" in word] == ["--deselect=tests/kernels/test_a.py::test_b[3-[1, 2]]"]
    assert "3 tests, 1 failed\n- tests/kernels/test_a.py::test_c" in gpu_check.summary(chosen)


def test_outcomes_of_other_code_do_not_count(tmp_path, monkeypatch):
    chosen = options(tmp_path, "--part", "suite", "--quick", "--commit", "abc")
    monkeypatch.setattr(gpu_check, "run", lambda command, log, limit_s: 0)
    gpu_check.main(["--out", str(tmp_path), "--part", "suite", "--quick", "--commit", "old"])
    log = gpu_check.log_of("suite", tmp_path)
    log.write_text(log.read_text() + SUITE)
    assert gpu_check.test_outcomes(chosen) == {}
    assert len(gpu_check.test_outcomes(options(tmp_path, "--commit", "old"))) == 3
    assert gpu_check.test_outcomes(options(tmp_path)) == {}


def test_the_suite_leaves_out_pytest_benchmark_and_slow_tests(tmp_path):
    command = " ".join(gpu_check.command_of("suite", options(tmp_path)))
    assert " -p no:benchmark " in command and " -m not slow " in command


def test_all_parts_run_and_one_that_fails_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        gpu_check, "command_of", lambda part, _: ["sh", "-c", f"echo {part} broke; test {part} != time"]
    )
    assert gpu_check.main(["--quick", "--out", str(tmp_path), "--part", "check,time,step"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("| ok ") == 2 and "| status 1 |" in printed
    assert "\ntime broke\n" in printed and "\nstep broke\n" not in printed
