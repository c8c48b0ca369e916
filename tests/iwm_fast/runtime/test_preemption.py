"""Told to stop, at any moment and by whatever process: one checkpoint, a status, no orphans, and it goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fixtures.launchers import (
    PATIENCE_S,
    WATCHED,
    Started,
    catches,
    checkpoints_in,
    deepspeed,
    launch_process,
    one_process,
    starting,
    tiny_yaml,
    torchrun,
)
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.runtime.preemption import EXIT_PREEMPTED
from iwm_fast.runtime.run_status import read_status, write_status


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory, tiny_shards) -> Path:
    return tiny_yaml(
        tmp_path_factory.mktemp("preempted") / "run.yaml",
        tiny_shards,
        optim={"epochs": 20000},
        runtime={"loader_threads": 1},
        output={"log_every": 1, "checkpoint_every": 100000},
    )


@pytest.fixture
def start(run_yaml, tmp_path):
    with starting(run_yaml, tmp_path / "run") as begin:
        yield begin


def assert_preempted(run: Started, reason: str) -> int:
    """Check what a preempted run leaves, and return the step it can go on from."""
    status = read_status(run.folder)
    log = run.log.read_text()
    assert status["state"] == "preempted" and reason in status["reason"], (status, log)
    assert checkpoints_in(run.folder) == [f"step-{status['step']:08d}"], log
    return status["step"]


def assert_goes_on(run: Started, launcher: list[str], start, step: int) -> None:
    resumed = start(launcher, "resume=auto")
    # which it says when rows behind the checkpoint are gone
    resumed.wait_for(lambda: read_status(run.folder)["state"] == "running")
    resumed.wait_for(lambda: any(row["step"] >= step + 3 for row in read_metrics(run.folder)))
    assert read_status(run.folder)["state"] == "running"
    assert [row["step"] for row in read_metrics(run.folder)][:step] == list(range(1, step + 1))


@pytest.mark.launcher
def test_a_process_alone_stops_behind_its_step_and_goes_on(start):
    run = start(one_process())
    run.wait_for_steps()
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == EXIT_PREEMPTED
    assert_goes_on(run, one_process(), start, assert_preempted(run, "SIGTERM"))


SIGNALLED = {
    # launcher, who is told, by what, what the status says
    "launch process": (launch_process, "launcher", signal.SIGTERM, ""),
    "rank 0 under deepspeed": (deepspeed, "rank 0", signal.SIGUSR1, "SIGUSR1"),
    "a scheduler's group": (deepspeed, "group", signal.SIGTERM, "SIGTERM"),
    "launch process dies of it": (launch_process, "launcher", signal.SIGUSR1, "launcher"),
    "launch process is killed": (launch_process, "launcher", signal.SIGKILL, "launcher"),
}
OFTEN = ("rank 0 under deepspeed",)


@pytest.mark.launcher
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in OFTEN else [pytest.mark.slow]) for name in SIGNALLED]
)
def test_all_ranks_stop_together_whoever_is_told(start, case):
    launcher, told, number, reason = SIGNALLED[case]
    run = start(launcher())
    run.wait_for_steps()
    if told == "group":
        os.killpg(run.process.pid, number)
    else:
        os.kill(run.process.pid if told == "launcher" else run.ranks()[int(told[-1])], number)
    assert run.end() != 0
    step = assert_preempted(run, reason)
    # two ranks, one checkpoint, and both agree where the run stands
    assert_goes_on(run, launcher(), start, step)


@pytest.mark.launcher
def test_a_stop_while_the_run_starts_leaves_a_status_and_no_checkpoint(start):
    run = start(one_process())
    # as soon as the process listens: before its data and networks are there
    run.wait_for(lambda: catches(run.process.pid, signal.SIGUSR1))
    run.process.send_signal(signal.SIGUSR1)
    assert run.end() == EXIT_PREEMPTED
    assert read_status(run.folder)["state"] == "preempted", run.log.read_text()
    assert not checkpoints_in(run.folder)
    start(one_process(), "resume=auto").wait_for_steps()


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_a_rank_that_dies_ends_the_run_which_goes_on_from_its_checkpoint(start, launcher):
    run = start(launcher(), "output.checkpoint_every=2")
    run.wait_for(lambda: len(checkpoints_in(run.folder)) > 1)
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.end() != 0
    status = read_status(run.folder)
    assert status["state"] == "failed" and "another rank is gone or hangs" in status["reason"], run.log.read_text()
    saved = int(checkpoints_in(run.folder)[-1].removeprefix("step-"))
    assert_goes_on(run, launcher(), start, saved)


@pytest.mark.launcher
@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_after_the_time_that_ranks_wait(start):
    run = start(torchrun(), "runtime.rank_timeout_s=8")
    run.wait_for_steps()
    os.kill(run.ranks()[1], signal.SIGSTOP)
    assert run.end() != 0
    assert read_status(run.folder)["state"] == "failed", run.log.read_text()
    assert "hangs" in run.log.read_text()


@pytest.mark.launcher
def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(start):
    run = start(one_process())
    run.wait_for_steps()
    log = run.log.read_text
    second = subprocess.run(
        [*one_process(), str(run.folder / "config.yaml"), "resume=auto"], capture_output=True, text=True, check=False
    )
    assert second.returncode == 2 and "Traceback" not in second.stderr
    assert f"is in use by another run (last heard of as process {run.process.pid}" in second.stderr
    done = len(read_metrics(run.folder))
    run.wait_for_steps(done + 3)
    assert read_status(run.folder)["state"] == "running", log()


@pytest.mark.launcher
def test_a_run_that_ends_says_finished(start):
    run = start(one_process(), "optim.epochs=2", "optim.warmup_epochs=0.5")
    assert run.end() == 0
    status = read_status(run.folder)
    assert status["state"] == "finished" and checkpoints_in(run.folder) == [f"step-{status['step']:08d}"]
    weights = load_file(run.folder / "checkpoints" / f"step-{status['step']:08d}" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


STUCK = """
import sys, threading
from pathlib import Path
from iwm_fast.runtime import preemption
from iwm_fast.runtime.run_status import write_status
preemption.GRACE_S = 1.0
stop = preemption.Preemption()
stop.install_handlers(watch_parent=False)
stop.record_step_duration(0.5)
stop.on_timeout = lambda: write_status(Path(sys.argv[1]), "preempted", reason=stop.reason)
print("listening", flush=True)
threading.Lock().acquire() and threading.Event().wait()
"""


def test_what_cannot_reach_the_end_of_its_step_ends_all_the_same(tmp_path):
    stuck = subprocess.Popen([sys.executable, "-c", STUCK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert stuck.stdout and stuck.stdout.readline() == "listening\n"
    began = time.monotonic()
    stuck.send_signal(signal.SIGTERM)
    assert stuck.wait(timeout=PATIENCE_S) == EXIT_PREEMPTED
    # the grace and the longest step
    assert time.monotonic() - began >= 1.5
    stuck.stdout.close()
    assert read_status(tmp_path)["state"] == "preempted" and read_status(tmp_path)["reason"] == "SIGTERM"


@pytest.mark.launcher
def test_a_checkpoint_is_finished_however_long_the_disk_takes(start):
    # its six files and folders take longer than a stop may take to reach the end of its step
    run = start(one_process(WATCHED), IWM_TEST_DISK_S="0.7", IWM_TEST_GRACE_S="0.5")
    run.wait_for_steps()
    run.process.send_signal(signal.SIGTERM)
    run.wait_for(lambda: bool(list(run.folder.glob("checkpoints/.unfinished-step-*"))))
    # whoever told it to stop may say so again
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == EXIT_PREEMPTED
    assert_preempted(run, "SIGTERM")


@pytest.mark.launcher
@pytest.mark.slow
def test_a_run_that_is_killed_while_it_saves_its_stop_was_preempted_and_has_not_failed(start):
    run = start(torchrun(target=WATCHED), "output.checkpoint_every=20", IWM_TEST_DISK_S="1")
    run.wait_for(lambda: bool(checkpoints_in(run.folder)))
    ranks = run.ranks()
    os.kill(ranks[1], signal.SIGTERM)
    run.wait_for(lambda: "stopping behind this step" in run.log.read_text())
    run.wait_for(lambda: bool(list(run.folder.glob("checkpoints/.unfinished-step-*"))))
    time.sleep(0.5)
    os.kill(ranks[0], signal.SIGKILL)
    assert run.end() != 0
    status = read_status(run.folder)
    assert status["state"] == "preempted" and "another rank is gone" in status["reason"], run.log.read_text()
    assert "step" not in status, "it names no checkpoint that is not there"
    assert_goes_on(run, one_process(), start, int(checkpoints_in(run.folder)[-1].removeprefix("step-")))


@pytest.mark.launcher
@pytest.mark.slow
def test_what_cannot_reach_the_end_of_its_step_says_so_before_its_launcher_kills_it(start):
    run = start(torchrun(), "output.checkpoint_every=2")
    run.wait_for(lambda: bool(checkpoints_in(run.folder)))
    os.kill(run.ranks()[1], signal.SIGSTOP)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() != 0
    status = read_status(run.folder)
    assert status["state"] == "preempted" and status["reason"] == "SIGTERM", (status, run.log.read_text())
    assert "leaving without a checkpoint" in run.log.read_text()


@pytest.mark.launcher
def test_a_failure_of_an_earlier_start_does_not_hide_that_this_one_was_stopped(start, tmp_path):
    write_status(tmp_path / "run", "failed", step=4, reason="disk full")
    # gives up while torch is imported, as a start would that hangs
    run = start(one_process(WATCHED), IWM_TEST_GRACE_S="1")
    run.wait_for(lambda: catches(run.process.pid, signal.SIGUSR1))
    run.process.send_signal(signal.SIGUSR1)
    assert run.end() == EXIT_PREEMPTED
    assert "leaving without a checkpoint" in run.log.read_text()
    status = read_status(run.folder)
    assert status["state"] == "preempted" and status["reason"] == "SIGUSR1"


OTHERS_SIGNAL = """
import signal, sys, time
from iwm_fast.runtime import preemption
stop = preemption.Preemption()
stop.install_handlers(watch_parent=False)
signal.signal(signal.SIGUSR2, lambda *_: print("heard", flush=True))
print("listening", flush=True)
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.raise_signal(number)
    time.sleep(2 * preemption._LOOK_EVERY_S)
    print(f"told: {stop.reason}", flush=True)
"""


def test_a_signal_that_something_else_listens_to_stops_no_run():
    done = subprocess.run([sys.executable, "-c", OTHERS_SIGNAL], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["listening", "heard", "told: ", "told: SIGTERM"]


def test_a_failure_is_not_overwritten_by_the_preemption_it_brings(tmp_path):
    write_status(tmp_path, "running", step=3)
    write_status(tmp_path, "failed", step=4, reason="disk full")
    write_status(tmp_path, "preempted", step=4, reason="SIGTERM")
    assert read_status(tmp_path)["state"] == "failed" and read_status(tmp_path)["reason"] == "disk full"
    # unless it is what the start found
    earlier = read_status(tmp_path)
    write_status(tmp_path, "preempted", earlier=earlier, reason="SIGTERM")
    assert read_status(tmp_path)["state"] == "preempted"
    write_status(tmp_path, "failed", step=5, reason="disk full again")
    write_status(tmp_path, "preempted", earlier=earlier, reason="SIGTERM")
    assert read_status(tmp_path)["reason"] == "disk full again"
    write_status(tmp_path, "running", step=4)
    assert read_status(tmp_path)["state"] == "running"
