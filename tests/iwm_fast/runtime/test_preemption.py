"""Stopping a run by any signal, at any time: it leaves one checkpoint, a status and no processes, and can resume."""

import os
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fixtures.launchers import (
    TIMEOUT_S,
    WATCHED_TRAIN,
    LaunchedRun,
    checkpoints_in,
    deepspeed,
    has_handler,
    launch_process,
    one_process,
    run_starter,
    tiny_yaml,
    torchrun,
)
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.runtime.preemption import EXIT_ABORTED, EXIT_PREEMPTED, STOP_SIGNALS
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
    with run_starter(run_yaml, tmp_path / "run") as begin:
        yield begin


def assert_preempted(run: LaunchedRun, reason: str) -> int:
    """Check what a preempted run leaves, and return the step that it can resume from."""
    status = read_status(run.folder)
    log = run.log.read_text()
    assert status["state"] == "preempted" and reason in status["reason"], (status, log)
    assert checkpoints_in(run.folder) == [f"step-{status['step']:08d}"], log
    return status["step"]


def assert_resumes(run: LaunchedRun, launcher: list[str], start, step: int) -> None:
    resumed = start(launcher, "resume=auto")
    # A run reports this state after it has removed the metrics of steps after the checkpoint.
    resumed.wait_for(lambda: read_status(run.folder)["state"] == "running")
    resumed.wait_for(lambda: any(row["step"] >= step + 3 for row in read_metrics(run.folder)))
    assert read_status(run.folder)["state"] == "running"
    assert [row["step"] for row in read_metrics(run.folder)][:step] == list(range(1, step + 1))


@pytest.mark.launcher
def test_a_single_process_stops_after_its_step_and_resumes(start):
    run = start(one_process())
    run.wait_for_steps()
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == EXIT_PREEMPTED
    assert_resumes(run, one_process(), start, assert_preempted(run, "SIGTERM"))


SIGNALLED_PROCESSES = {
    # launcher, process that receives the signal, signal, reason in the status
    "launch process": (launch_process, "launcher", signal.SIGTERM, ""),
    "rank 0 under deepspeed": (deepspeed, "rank 0", signal.SIGUSR1, "SIGUSR1"),
    "a scheduler's group": (deepspeed, "group", signal.SIGTERM, "SIGTERM"),
    "launch process dies of it": (launch_process, "launcher", signal.SIGUSR1, "launcher"),
    "launch process is killed": (launch_process, "launcher", signal.SIGKILL, "launcher"),
}
NOT_SLOW = ("rank 0 under deepspeed",)


@pytest.mark.launcher
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name in NOT_SLOW else [pytest.mark.slow]) for name in SIGNALLED_PROCESSES]
)
def test_all_ranks_stop_together_whichever_process_is_signalled(start, case):
    launcher, receiver, number, reason = SIGNALLED_PROCESSES[case]
    run = start(launcher())
    run.wait_for_steps()
    if receiver == "group":
        os.killpg(run.process.pid, number)
    else:
        os.kill(run.process.pid if receiver == "launcher" else run.ranks()[int(receiver[-1])], number)
    assert run.end() != 0
    step = assert_preempted(run, reason)
    # Two ranks wrote one checkpoint, and both resume from its step.
    assert_resumes(run, launcher(), start, step)


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_during_the_start_leaves_a_status_and_no_checkpoint(start, number):
    run = start(one_process())
    # As soon as the handlers are installed, which is before data and networks are loaded, and before torch is imported.
    run.wait_for(lambda: has_handler(run.process.pid, STOP_SIGNALS[-1]))
    run.process.send_signal(number)
    assert run.end() == EXIT_PREEMPTED
    status = read_status(run.folder)
    assert status["state"] == "preempted" and status["reason"] == number.name, run.log.read_text()
    assert f"{number.name}: stopped after step 0" in run.log.read_text()
    assert not checkpoints_in(run.folder)
    start(one_process(), "resume=auto").wait_for_steps()


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_a_killed_rank_ends_the_run_which_resumes_from_its_checkpoint(start, launcher):
    run = start(launcher(), "output.checkpoint_every=2")
    run.wait_for(lambda: len(checkpoints_in(run.folder)) > 1)
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.end() != 0
    status = read_status(run.folder)
    assert status["state"] == "failed" and "another rank is gone or hangs" in status["reason"], run.log.read_text()
    saved = int(checkpoints_in(run.folder)[-1].removeprefix("step-"))
    assert_resumes(run, launcher(), start, saved)


@pytest.mark.launcher
@pytest.mark.slow
def test_a_rank_that_hangs_ends_the_run_after_rank_timeout_s(start):
    run = start(torchrun(), "runtime.rank_timeout_s=8")
    run.wait_for_steps()
    os.kill(run.ranks()[1], signal.SIGSTOP)
    assert run.end() != 0
    assert read_status(run.folder)["state"] == "failed", run.log.read_text()
    assert "hangs" in run.log.read_text()


@pytest.mark.launcher
def test_a_second_run_in_the_same_folder_is_refused(start):
    run = start(one_process())
    run.wait_for_steps()
    log = run.log.read_text
    second = subprocess.run(
        [*one_process(), str(run.folder / "config.yaml"), "resume=auto"], capture_output=True, text=True, check=False
    )
    assert second.returncode == 2 and "Traceback" not in second.stderr
    assert f"is in use by another run (last reported by process {run.process.pid}" in second.stderr
    # The first run continues.
    run.wait_for_steps(len(read_metrics(run.folder)) + 3)
    assert read_status(run.folder)["state"] == "running", log()


@pytest.mark.launcher
def test_a_run_that_ends_has_the_status_finished(start):
    run = start(one_process(), "optim.epochs=2", "optim.warmup_epochs=0.5")
    assert run.end() == 0
    status = read_status(run.folder)
    assert status["state"] == "finished" and checkpoints_in(run.folder) == [f"step-{status['step']:08d}"]
    weights = load_file(run.folder / "checkpoints" / f"step-{status['step']:08d}" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


HANGING_SCRIPT = """
import sys, threading
from pathlib import Path
from iwm_fast.runtime import preemption
from iwm_fast.runtime.run_status import write_status
preemption.GRACE_PERIOD_S = 1.0
stop = preemption.Preemption()
stop.install_handlers(watch_parent=False)
stop.record_step_duration(0.5)
stop.on_timeout = lambda: write_status(Path(sys.argv[1]), "preempted", reason=stop.reason)
print("listening", flush=True)
threading.Lock().acquire() and threading.Event().wait()
"""


def test_a_process_that_hangs_in_a_step_exits_after_the_grace_period(tmp_path):
    hanging = subprocess.Popen([sys.executable, "-c", HANGING_SCRIPT, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert hanging.stdout and hanging.stdout.readline() == "listening\n"
    start_s = time.monotonic()
    hanging.send_signal(signal.SIGTERM)
    assert hanging.wait(timeout=TIMEOUT_S) == EXIT_PREEMPTED
    # The grace period plus the longest step.
    assert time.monotonic() - start_s >= 1.5
    hanging.stdout.close()
    assert read_status(tmp_path)["state"] == "preempted" and read_status(tmp_path)["reason"] == "SIGTERM"


def test_a_step_longer_than_the_launcher_waits_has_the_status_preempted_before_it_ends(tmp_path):
    script = HANGING_SCRIPT.replace("record_step_duration(0.5)", "record_step_duration(3600.0)")
    hanging = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert hanging.stdout and hanging.stdout.readline() == "listening\n"
        hanging.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + TIMEOUT_S
        while not read_status(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert hanging.poll() is None
    finally:
        hanging.kill()
        hanging.communicate()
    assert read_status(tmp_path)["state"] == "preempted" and read_status(tmp_path)["reason"] == "SIGTERM"


def test_a_second_ctrl_c_aborts_a_process_that_hangs(tmp_path):
    script = HANGING_SCRIPT.replace("GRACE_PERIOD_S = 1.0", "_SECOND_CTRL_C_S = 0.5")
    command = [sys.executable, "-c", script, str(tmp_path)]
    hanging = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert hanging.stdout and hanging.stdout.readline() == "listening\n"
    hanging.send_signal(signal.SIGTERM)
    # Of signals that are pending at the same time, the kernel delivers the one with the lowest number first.
    assert hanging.stderr and hanging.stderr.readline() == "SIGTERM: stopping after this step\n"
    for _ in range(2):
        # A launcher passes on the Ctrl-C that its ranks have received themselves.
        hanging.send_signal(signal.SIGINT)
        time.sleep(0.1)
    time.sleep(0.6)
    assert hanging.poll() is None
    hanging.send_signal(signal.SIGINT)
    assert hanging.wait(timeout=TIMEOUT_S) == EXIT_ABORTED == 130
    hanging.communicate()
    assert read_status(tmp_path)["state"] == "preempted" and read_status(tmp_path)["reason"] == "SIGTERM"


@pytest.mark.launcher
@pytest.mark.slow
def test_the_final_checkpoint_may_take_longer_than_the_grace_period(start):
    # Forcing the checkpoint's six files and folders to disk takes longer than the grace period.
    run = start(one_process(WATCHED_TRAIN), IWM_TEST_DISK_S="0.7", IWM_TEST_GRACE_S="0.5")
    run.wait_for_steps()
    run.process.send_signal(signal.SIGTERM)
    run.wait_for(lambda: bool(list(run.folder.glob("checkpoints/.unfinished-step-*"))))
    # A scheduler may repeat its signal.
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == EXIT_PREEMPTED
    assert_preempted(run, "SIGTERM")


@pytest.mark.launcher
@pytest.mark.slow
def test_a_run_killed_during_its_final_checkpoint_counts_as_preempted(start):
    run = start(torchrun(target=WATCHED_TRAIN), "output.checkpoint_every=20", IWM_TEST_DISK_S="1")
    run.wait_for(lambda: bool(checkpoints_in(run.folder)))
    ranks = run.ranks()
    os.kill(ranks[1], signal.SIGTERM)
    run.wait_for(lambda: "stopping after this step" in run.log.read_text())
    run.wait_for(lambda: bool(list(run.folder.glob("checkpoints/.unfinished-step-*"))))
    time.sleep(0.5)
    os.kill(ranks[0], signal.SIGKILL)
    assert run.end() != 0
    status = read_status(run.folder)
    assert status["state"] == "preempted" and "another rank is gone" in status["reason"], run.log.read_text()
    assert "step" not in status, "the status must not name a step without a checkpoint"
    assert_resumes(run, one_process(), start, int(checkpoints_in(run.folder)[-1].removeprefix("step-")))


@pytest.mark.launcher
@pytest.mark.slow
def test_a_run_that_cannot_stop_writes_its_status_before_it_is_killed(start):
    run = start(torchrun(), "output.checkpoint_every=2")
    run.wait_for(lambda: bool(checkpoints_in(run.folder)))
    os.kill(run.ranks()[1], signal.SIGSTOP)
    run.process.send_signal(signal.SIGTERM)
    assert run.end() != 0
    status = read_status(run.folder)
    assert status["state"] == "preempted" and status["reason"] == "SIGTERM", (status, run.log.read_text())
    assert "leaving without a checkpoint" in run.log.read_text()


@pytest.mark.launcher
def test_an_earlier_failure_does_not_hide_that_this_start_was_stopped(start, tmp_path):
    write_status(tmp_path / "run", "failed", step=4, reason="disk full")
    # The grace period ends while torch is imported, as in a start that hangs.
    run = start(one_process(WATCHED_TRAIN), IWM_TEST_GRACE_S="1")
    run.wait_for(lambda: has_handler(run.process.pid, signal.SIGUSR1))
    run.process.send_signal(signal.SIGUSR1)
    assert run.end() == EXIT_PREEMPTED
    assert "leaving without a checkpoint" in run.log.read_text()
    status = read_status(run.folder)
    assert status["state"] == "preempted" and status["reason"] == "SIGUSR1"


OTHER_SIGNAL_SCRIPT = """
import signal, sys, time
from iwm_fast.runtime import preemption
stop = preemption.Preemption()
stop.install_handlers(watch_parent=False)
signal.signal(signal.SIGUSR2, lambda *_: print("received", flush=True))
print("listening", flush=True)
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.raise_signal(number)
    time.sleep(2 * preemption._POLL_INTERVAL_S)
    print(f"reason: {stop.reason}", flush=True)
"""


EVERY_SIGNAL_SCRIPT = """
import os, signal, sys, time
from iwm_fast.runtime import preemption
for number in preemption.STOP_SIGNALS:
    if os.fork():
        os.wait()
        continue
    if "ignored" in sys.argv:
        signal.signal(number, signal.SIG_IGN)
    stop = preemption.Preemption()
    stop.install_handlers(watch_parent=False)
    signal.raise_signal(number)
    end = time.monotonic() + (0.3 if "ignored" in sys.argv else 60)
    while not stop.reason and time.monotonic() < end:
        time.sleep(0.01)
    print(number.name, stop.reason, flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("disposition", ["default", "ignored"])
def test_every_signal_stops_a_run_unless_it_is_inherited_as_ignored(disposition):
    command = [sys.executable, "-c", EVERY_SIGNAL_SCRIPT, disposition]
    completed = subprocess.run(command, capture_output=True, text=True, check=True)
    names = ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"]
    reasons = {name: name if disposition == "default" else "" for name in names}
    assert dict(line.split(" ", 1) for line in completed.stdout.splitlines()) == reasons
    assert ("stopping after this step" in completed.stderr) == (disposition == "default")
    assert "SIGINT: stopping after this step; Ctrl-C again aborts" in completed.stderr or disposition == "ignored"


@pytest.mark.launcher
@pytest.mark.slow
def test_a_run_saves_when_its_terminal_closes(run_yaml, tmp_path):
    master, terminal = os.openpty()
    # An interactive terminal, on which the run draws its progress bar.
    environment = os.environ | {"TERM": "xterm"}
    command = ["setsid", "--ctty", *one_process(), str(run_yaml), f"output.folder={tmp_path / 'run'}"]
    run = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    reader = threading.Thread(target=read_until_closed, args=(master,), daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + TIMEOUT_S
        while len(read_metrics(tmp_path / "run")) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        # The kernel then sends SIGHUP, and what the run prints is an error.
        os.close(master)
        assert run.wait(timeout=TIMEOUT_S) == EXIT_PREEMPTED
    finally:
        run.kill()
        run.wait()
    status = read_status(tmp_path / "run")
    assert status["state"] == "preempted" and status["reason"] == "SIGHUP", status
    assert checkpoints_in(tmp_path / "run") == [f"step-{status['step']:08d}"]


def read_until_closed(master: int) -> None:
    with suppress(OSError):
        while select.select([master], [], [], 0.1)[0] == [] or os.read(master, 65536):
            pass


def test_a_signal_that_a_library_handles_does_not_stop_the_run():
    completed = subprocess.run([sys.executable, "-c", OTHER_SIGNAL_SCRIPT], capture_output=True, text=True, check=True)
    assert completed.stdout.splitlines() == ["listening", "received", "reason: ", "reason: SIGTERM"]


def test_a_failure_is_not_overwritten_by_the_preemption_it_causes(tmp_path):
    write_status(tmp_path, "running", step=3)
    write_status(tmp_path, "failed", step=4, reason="disk full")
    write_status(tmp_path, "preempted", step=4, reason="SIGTERM")
    assert read_status(tmp_path)["state"] == "failed" and read_status(tmp_path)["reason"] == "disk full"
    # A failure that was there when this process started is an earlier one, and is overwritten.
    earlier = read_status(tmp_path)
    write_status(tmp_path, "preempted", earlier=earlier, reason="SIGTERM")
    assert read_status(tmp_path)["state"] == "preempted"
    write_status(tmp_path, "failed", step=5, reason="disk full again")
    write_status(tmp_path, "preempted", earlier=earlier, reason="SIGTERM")
    assert read_status(tmp_path)["reason"] == "disk full again"
    write_status(tmp_path, "running", step=4)
    assert read_status(tmp_path)["state"] == "running"
