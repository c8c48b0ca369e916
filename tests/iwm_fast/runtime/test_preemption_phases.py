"""Told to stop in each phase of a run, by each signal, whichever process is told: the run ends in order all the same.

Or as README's table says of that launcher. Cases, so that all take minutes: under torchrun the agent is told by either
signal in every phase, and both ranks in every phase, one by each; under deepspeed every process by either signal, in
one phase after the other, and its launch process in every phase.
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
    PATIENCE_S,
    WATCHED,
    Started,
    catches,
    deepspeed,
    one_process,
    starting,
    tiny_yaml,
    torchrun,
)
from fixtures.tar_files import encode, photograph, write_tar
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.runtime.run_status import read_status

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(600)]

LAUNCHERS = {"torchrun": torchrun, "deepspeed": deepspeed}
TERM, USR1 = signal.SIGTERM, signal.SIGUSR1

# what makes a phase last
SETTINGS = {
    "start": [],
    "wait for data": ["data.train={large}", "data.val="],
    "step": ["model.encoder.depth=8", "optim.global_batch_size=96"],
    "save": ["output.checkpoint_every=1"],
    "evaluation": ["output.evaluate_every=1"],
}
SLOW_DISK = {"save": {"IWM_TEST_DISK_S": "0.2"}}
PHASES = list(SETTINGS)


def is_in(phase: str, run: Started, rank_zero: int) -> bool:
    """Return whether a run is in that phase: what its first rank is doing, and what is on the disk."""
    if phase == "save":
        return bool(list(run.folder.glob("checkpoints/.unfinished-step-*")))
    stack = stack_of(rank_zero, run.folder.with_name("stacks") / "0")
    in_step, waits = "in train_step\n" in stack, "in __next__\n" in stack
    return {
        "wait for data": in_step and waits,
        "step": in_step and not waits,
        # not that of the untrained networks at the start
        "evaluation": "in _measure_copy\n" in stack,
    }[phase]


def cases():
    for place, phase in enumerate(PHASES):
        for number in (TERM, USR1):
            yield "torchrun", "launcher", number, phase
        for rank in (0, 1):
            yield "torchrun", f"rank {rank}", (TERM, USR1)[(place + rank) % 2], phase
    pairs = product(("launcher", "launch process", "rank 0", "rank 1"), (TERM, USR1))
    turns = {(told, number, PHASES[place % len(PHASES)]) for place, (told, number) in enumerate(pairs)}
    every = {("launch process", (USR1, TERM)[place % 2], phase) for place, phase in enumerate(PHASES)}
    for told, number, phase in sorted(turns | every):
        yield "deepspeed", told, number, phase


def case_name(launcher: str, told: str, number: signal.Signals, phase: str) -> str:
    return f"{launcher}, {told}, {number.name}, {phase}"


# README: who dies of it, so that the ranks notice, and who passes nothing on
DIES = {("torchrun", "launcher", USR1), ("deepspeed", "launch process", USR1)}
PASSES_NOTHING_ON = {("deepspeed", "launcher", TERM), ("deepspeed", "launcher", USR1)}
OFTEN = {("torchrun", "launcher", TERM, "save"), ("torchrun", "rank 1", USR1, "start")}
GO_ON = {("torchrun", "launcher", TERM, phase) for phase in PHASES}


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Write images that take a hundred times longer to decode than the networks take for them."""
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
    with starting(settings, tmp_path / "run") as begin:
        yield begin


def stack_of(process: int, path: Path) -> str:
    """Return what the main thread of a watched process is doing."""
    begin, deadline = path.stat().st_size, time.monotonic() + PATIENCE_S
    # to that thread; a signal for a process may reach any of its threads
    ctypes.CDLL(None).tgkill(process, process, signal.SIGUSR2)
    while not (text := path.read_text()[begin:]).endswith("in <module>\n"):
        assert time.monotonic() < deadline, text
        time.sleep(0.001)
    return text


def wait_for_phase(run: Started, phase: str, told: str) -> int:
    """Return the process that is to be told, when the run is in that phase."""
    run.wait_for(lambda: {"rank 0", "rank 1", told} <= run.processes().keys())
    processes = run.processes()
    # a launcher's signal reaches its ranks: they must have begun to listen
    listening = [processes[told]] if told.startswith("rank") else run.ranks()
    run.wait_for(lambda: all(catches(process, USR1) for process in listening))
    if phase != "start":
        run.wait_for_steps(1)
        run.wait_for(lambda: is_in(phase, run, processes["rank 0"]), every_s=0.005)
    return processes[told]


def assert_ended_in_order(run: Started, reason: str) -> int:
    """Check what the run has left, and return the step it can go on from."""
    status, log = read_status(run.folder), run.log.read_text()
    assert status.get("state") == "preempted" and reason in status["reason"], (status, log)
    # of one that gives up before it has begun, nothing is there
    step = status.get("step", 0)
    saved, refused = checkpoints.read_newest(run.folder)
    assert not refused and (saved.step if saved else 0) == step, (status, log)
    assert not list(run.folder.glob("checkpoints/.unfinished-*"))
    assert [row["step"] for row in read_metrics(run.folder)] == list(range(1, step + 1))
    return step


def assert_goes_on(run: Started, again: Started, step: int) -> None:
    again.wait_for(lambda: read_status(run.folder)["state"] == "running")
    again.wait_for(lambda: any(row["step"] >= step + 2 for row in read_metrics(run.folder)))
    assert read_status(run.folder)["state"] == "running"
    assert f"resuming from {checkpoints.folder_of(run.folder, step)}" in run.log.read_text() or not step


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=[] if case in OFTEN else [pytest.mark.slow], id=case_name(*case)) for case in cases()],
)
def test_a_stop_is_in_order_whatever_it_interrupts_and_whoever_is_told(start, large, tmp_path, case):
    launcher, told, number, phase = case
    settings = [setting.format(large=large) for setting in SETTINGS[phase]]
    environment = {"IWM_TEST_STACKS": str(tmp_path / "stacks"), **SLOW_DISK.get(phase, {})}
    run = start(LAUNCHERS[launcher](target=WATCHED), *settings, **environment)
    os.kill(wait_for_phase(run, phase, told), number)
    reason = "the launcher ended" if case[:3] in DIES else number.name
    if case[:3] in PASSES_NOTHING_ON:
        run.wait_for_steps(len(read_metrics(run.folder)) + 3)
        assert read_status(run.folder)["state"] == "running" and run.process.poll() == -number
        os.killpg(run.process.pid, TERM)
        reason = "SIGTERM"
    # deepspeed takes no notice of what its launch process died of
    assert run.end() != 0 or case[:3] in DIES
    step = assert_ended_in_order(run, reason)
    if case in GO_ON:
        assert_goes_on(run, start(one_process(), *settings, "resume=auto"), step)
