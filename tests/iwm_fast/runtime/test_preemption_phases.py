"""Signals to each process of a run in each of its phases: the run stops cleanly, or as docs/resuming.md describes.

Not all combinations are tested, so that the tests take minutes only. In every phase, each process of torchrun and
deepspeed's launch process receive at least one of the signals, and all signals take turns. deepspeed itself, which
passes none on, and its ranks receive each signal in one phase.
"""

import ctypes
import os
import signal
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from fixtures.launchers import (
    TIMEOUT_S,
    WATCHED_TRAIN,
    LaunchedRun,
    deepspeed,
    has_handler,
    one_process,
    run_starter,
    tiny_yaml,
    torchrun,
)
from fixtures.tar_files import encode, photograph, write_tar
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.runtime.preemption import STOP_SIGNALS
from iwm_fast.runtime.run_status import read_status

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(600)]

LAUNCHERS = {"torchrun": torchrun, "deepspeed": deepspeed}
TERM, INT, HUP, USR1, USR2, XCPU = STOP_SIGNALS

# Settings that make each phase last long enough to be interrupted.
SETTINGS = {
    "start": [],
    "wait for data": ["data.train={large}", "data.val="],
    "step": ["model.encoder.depth=8", "optim.global_batch_size=96"],
    "save": ["output.checkpoint_every=1"],
    "evaluation": ["output.evaluate_every=1"],
}
SLOW_DISK = {"save": {"IWM_TEST_DISK_S": "0.2"}}
PHASES = list(SETTINGS)


def is_in(phase: str, run: LaunchedRun, rank_zero: int) -> bool:
    """Return whether a run is in a phase, from the stack of rank 0 and the files on the disk."""
    if phase == "save":
        return bool(list(run.folder.glob("checkpoints/.unfinished-step-*")))
    stack = stack_of(rank_zero, run.folder.with_name("stacks") / "0")
    is_in_step, is_waiting = "in train_step\n" in stack, "in __next__\n" in stack
    return {
        "wait for data": is_in_step and is_waiting,
        "step": is_in_step and not is_waiting,
        # Only evaluations during training, not that of the untrained networks at the start.
        "evaluation": "in _measure\n" in stack and "in _open_and_measure\n" not in stack,
    }[phase]


def cases():
    """Yield launcher, process that receives the signal, signal and phase."""
    for index, phase in enumerate(PHASES):
        yield "torchrun", "launcher", TERM, phase
        yield "torchrun", "launcher", (USR1, INT, HUP, USR2, XCPU)[index], phase
        for rank in (0, 1):
            yield "torchrun", f"rank {rank}", STOP_SIGNALS[(index + 3 * rank) % 6], phase
        yield "deepspeed", "launch process", (HUP, TERM, USR1, INT, XCPU)[index], phase
    for index, (receiver, number) in enumerate(product(("launcher", "rank 0", "rank 1"), STOP_SIGNALS)):
        # Each receiver begins with another phase.
        yield "deepspeed", receiver, number, PHASES[(index + index // 6) % len(PHASES)]


def case_name(launcher: str, receiver: str, number: signal.Signals, phase: str) -> str:
    return f"{launcher}, {receiver}, {number.name}, {phase}"


# As in README's table: processes that the signal kills, which the ranks notice, and those that do not pass it on.
KILLED = {("torchrun", "launcher", number) for number in (USR1, USR2, XCPU)}
KILLED |= {("deepspeed", "launch process", number) for number in (HUP, USR1, USR2, XCPU)}
NOT_PASSED_ON = {("deepspeed", "launcher", number) for number in STOP_SIGNALS}
NOT_SLOW = {("torchrun", "rank 1", USR1, "start")}
RESUMED = {("torchrun", "launcher", TERM, phase) for phase in PHASES}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Write a shard of images that take a hundred times longer to decode than the networks need for them."""
    path = tmp_path_factory.mktemp("large") / "large.tar"
    pixels = np.kron(photograph("coffee.png")[:300, :300], np.ones((8, 8, 1), np.uint8))
    write_tar(path, [(f"{number:02}.jpg", encode(pixels)) for number in range(16)])
    return path


@pytest.fixture
def start(tiny_shards, tmp_path):
    settings = tiny_yaml(
        tmp_path / "run.yaml",
        tiny_shards,
        optim={"epochs": 20000},
        runtime={"loader_threads": 1},
        output={"log_every": 1, "checkpoint_every": 100000},
    )
    (tmp_path / "stacks").mkdir()
    with run_starter(settings, tmp_path / "run") as begin:
        yield begin


def stack_of(process: int, path: Path) -> str:
    """Return the stack of the main thread of a watched process."""
    old_size, deadline = path.stat().st_size, time.monotonic() + TIMEOUT_S
    # tgkill signals the main thread; kill would signal any thread of the process.
    ctypes.CDLL(None).tgkill(process, process, signal.SIGRTMIN)
    while not (text := path.read_text()[old_size:]).endswith("in <module>\n"):
        assert time.monotonic() < deadline, text
        time.sleep(0.001)
    return text


def wait_for_phase(run: LaunchedRun, phase: str, receiver: str) -> int:
    """Wait until a run is in a phase, and return the process id of the process that receives the signal."""
    run.wait_for(lambda: {"rank 0", "rank 1", receiver} <= run.processes().keys())
    processes = run.processes()
    # A launcher passes the signal on to its ranks, so they must have installed their handlers.
    listening = [processes[receiver]] if receiver.startswith("rank") else run.ranks()
    run.wait_for(lambda: all(has_handler(process, USR1) for process in listening))
    if phase != "start":
        run.wait_for_steps(1)
        run.wait_for(lambda: is_in(phase, run, processes["rank 0"]), every_s=0.005)
    return processes[receiver]


def assert_stopped_cleanly(run: LaunchedRun, reason: str) -> int:
    """Check what a run leaves, and return the step that it can resume from."""
    status, log = read_status(run.folder), run.log.read_text()
    assert status.get("state") == "preempted" and reason in status["reason"], (status, log)
    # A run that stops before its first step leaves no checkpoint.
    step = status.get("step", 0)
    saved, refused = checkpoints.read_newest(run.folder)
    assert not refused and (saved.step if saved else 0) == step, (status, log)
    assert not list(run.folder.glob("checkpoints/.unfinished-*"))
    assert [row["step"] for row in read_metrics(run.folder)] == list(range(1, step + 1))
    return step


def assert_resumes(run: LaunchedRun, resumed: LaunchedRun, step: int) -> None:
    resumed.wait_for(lambda: read_status(run.folder)["state"] == "running")
    resumed.wait_for(lambda: any(row["step"] >= step + 2 for row in read_metrics(run.folder)))
    assert read_status(run.folder)["state"] == "running"
    assert f"resuming from {checkpoints.checkpoint_folder(run.folder, step)}" in run.log.read_text() or not step


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in NOT_SLOW else [pytest.mark.slow], id=case_name(*case)) for case in cases()],
)
def test_a_run_stops_cleanly_in_any_phase_whichever_process_is_signalled(start, large, tmp_path, case):
    launcher, receiver, number, phase = case
    settings = [setting.format(large=large) for setting in SETTINGS[phase]]
    environment = {"IWM_TEST_STACKS": str(tmp_path / "stacks"), **SLOW_DISK.get(phase, {})}
    run = start(LAUNCHERS[launcher](target=WATCHED_TRAIN), *settings, **environment)
    os.kill(wait_for_phase(run, phase, receiver), number)
    # DeepSpeed's launch process passes on every signal that it handles as SIGTERM.
    passed_on = TERM if case[:2] == ("deepspeed", "launch process") else number
    reason = "the launcher ended" if case[:3] in KILLED else passed_on.name
    if case[:3] in NOT_PASSED_ON:
        run.wait_for_steps(len(read_metrics(run.folder)) + 3)
        assert run.process.wait(timeout=60) == -number and read_status(run.folder)["state"] == "running"
        os.killpg(run.process.pid, TERM)
        reason = "SIGTERM"
    # deepspeed ignores the signal that killed its launch process, and may exit with 0.
    assert run.end() != 0 or case[:3] in KILLED
    step = assert_stopped_cleanly(run, reason)
    if case in RESUMED:
        assert_resumes(run, start(one_process(), *settings, "resume=auto"), step)
