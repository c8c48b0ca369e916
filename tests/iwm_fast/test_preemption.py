"""Told to stop, at any moment and by whatever process: one checkpoint, a status, no orphans, and it goes on."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from iwm_fast.metrics import read_metrics
from iwm_fast.preemption import EXIT_PREEMPTED, read_status, write_status
from samples import encode, photograph, write_tar

TOOLS = Path(sys.executable).parent
# a launcher's own 30 s before it kills, and room for two busy cores
PATIENCE_S = 120


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory, tiny_shards) -> Path:
    settings = {
        "data": {"train": tiny_shards.pattern, "val": tiny_shards.pattern},
        "views": {"size": 16, "blur_sigma": [0.1, 1.0]},
        "model": {"encoder": {"dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4},
                  "predictor": {"dim": 16, "depth": 1, "num_heads": 1}},
        "optim": {"global_batch_size": 16, "epochs": 20000, "warmup_epochs": 1, "precision": "fp32"},
        "runtime": {"device": "cpu", "loader_threads": 1},
        "output": {"log_every": 1, "checkpoint_every": 100000},
    }  # fmt: skip
    path = tmp_path_factory.mktemp("preempted") / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def torchrun() -> list[str]:
    return [str(TOOLS / "torchrun"), "--nproc-per-node", "2", "--master-port", free_port(), "-m", "iwm_fast.train"]


def deepspeed() -> list[str]:
    ranks = ["--num_accelerators", "2", "--master_port", free_port()]
    return [str(TOOLS / "deepspeed"), *ranks, "--module", "iwm_fast.train"]


def deepspeeds_launch_process() -> list[str]:
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    place = ["--world_info", world, "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    return [sys.executable, "-m", "deepspeed.launcher.launch", *place, "--module", "iwm_fast.train"]


def alone() -> list[str]:
    return [sys.executable, "-m", "iwm_fast.cli", "train"]


class Started:
    """A run whose processes all carry a mark, so that everything it leaves behind can be found."""

    def __init__(self, launcher: list[str], *arguments: str, folder: Path) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.mark = f"IWM_TEST_RUN={uuid.uuid4().hex}"
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict([self.mark.split("=")])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*launcher, *arguments, f"output.folder={folder}"],
                stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True,
            )  # fmt: skip

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks, in their order."""
        return [process for _, process in sorted(found(self.mark))]

    def wait_for(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)

    def wait_for_steps(self, count: int = 3) -> None:
        self.wait_for(lambda: len(read_metrics(self.folder)) >= count)

    def end(self) -> int:
        """Wait for the end of everything, and return the exit code of what was started."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None or found(self.mark, everything=True):
            assert time.monotonic() < deadline, f"{found(self.mark, everything=True)} {self.log.read_text()}"
            time.sleep(0.1)
        return self.process.returncode

    def kill(self) -> None:
        for _, process in found(self.mark, everything=True):
            os.kill(process, signal.SIGKILL)
        self.process.wait()


def found(mark: str, *, everything: bool = False) -> list[tuple[int, int]]:
    """Return (rank, process id) of the ranks that a run consists of, or of all its processes that still run."""
    rows = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        # what ended has no command line any more
        if not command or mark.encode() not in environment:
            continue
        rank = re.search(rb"(?:^|\0)RANK=(\d+)", environment)
        if everything or (rank and b"iwm_fast.train" in command):
            rows.append((int(rank[1]) if rank else -1, int(entry.name)))
    return rows


@pytest.fixture
def start(run_yaml, tmp_path):
    runs = []

    def begin(launcher: list[str], *overrides: str) -> Started:
        runs.append(Started(launcher, str(run_yaml), *overrides, folder=tmp_path / "run"))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in (folder / "checkpoints").glob("step-*/manifest.json"))


def assert_preempted(run: Started, reason: str) -> int:
    """Check what a preempted run leaves, and return the step it can go on from."""
    status = read_status(run.folder)
    log = run.log.read_text()
    assert status["state"] == "preempted" and reason in status["reason"], (status, log)
    assert checkpoints(run.folder) == [f"step-{status['step']:08d}"], log
    return status["step"]


def assert_goes_on(run: Started, launcher: list[str], start, step: int) -> None:
    resumed = start(launcher, "resume=auto")
    resumed.wait_for(lambda: any(row["step"] >= step + 3 for row in read_metrics(run.folder)))
    assert read_status(run.folder)["state"] == "running"
    assert [row["step"] for row in read_metrics(run.folder)][:step] == list(range(1, step + 1))


@pytest.mark.launcher
def test_a_process_alone_stops_behind_its_step_and_goes_on(start):
    run = start(alone())
    run.wait_for_steps()
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == EXIT_PREEMPTED
    assert_goes_on(run, alone(), start, assert_preempted(run, "SIGTERM"))


SIGNALLED = {
    # launcher, who is told, by what, what the status says
    "torchrun, its agent": (torchrun, "launcher", signal.SIGTERM, "SIGTERM"),
    "torchrun, rank 1": (torchrun, "rank 1", signal.SIGUSR1, ""),
    "launch process": (deepspeeds_launch_process, "launcher", signal.SIGTERM, ""),
    "rank 0 under deepspeed": (deepspeed, "rank 0", signal.SIGUSR1, "SIGUSR1"),
    "a scheduler's group": (deepspeed, "group", signal.SIGTERM, "SIGTERM"),
    "launch process dies of it": (deepspeeds_launch_process, "launcher", signal.SIGUSR1, "launcher"),
    "launch process is killed": (deepspeeds_launch_process, "launcher", signal.SIGKILL, "launcher"),
}
OFTEN = ("torchrun, its agent", "rank 0 under deepspeed")


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
    run = start(alone())
    # as soon as the process listens: before its data and networks are there
    run.wait_for(lambda: catches(run.process.pid, signal.SIGUSR1))
    run.process.send_signal(signal.SIGUSR1)
    assert run.end() == EXIT_PREEMPTED
    assert read_status(run.folder)["state"] == "preempted", run.log.read_text()
    assert not checkpoints(run.folder)
    start(alone(), "resume=auto").wait_for_steps()


def catches(process: int, number: signal.Signals) -> bool:
    mask = re.search(rb"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{process}/status").read_bytes())
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


def write_large_images(path: Path) -> None:
    """Write images that take a hundred times longer to decode than the networks take for them."""
    pixels = np.kron(photograph("coffee.png")[:300, :300], np.ones((8, 8, 1), np.uint8))
    write_tar(path, [(f"{number:02}.jpg", encode(pixels)) for number in range(16)])


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.parametrize("moment", ["save", "evaluation", "wait for data"])
def test_a_stop_is_in_order_whatever_it_interrupts(start, moment, tmp_path):
    if moment == "wait for data":
        write_large_images(tmp_path / "large.tar")
    # most of the time goes into one of these
    busy = {
        "save": ["output.checkpoint_every=1"],
        "evaluation": ["output.evaluate_every=1"],
        "wait for data": [f"data.train={tmp_path}/large.tar", "data.val="],
    }[moment]
    run = start(alone(), *busy)
    run.wait_for_steps()
    if moment == "wait for data":
        assert read_metrics(run.folder)[-1]["data/wait_share"] > 0.8
    run.process.send_signal(signal.SIGTERM)
    assert run.end() == EXIT_PREEMPTED
    status = read_status(run.folder)
    assert status["state"] == "preempted" and checkpoints(run.folder)[-1] == f"step-{status['step']:08d}"
    assert not list((run.folder / "checkpoints").glob(".unfinished-*"))


@pytest.mark.launcher
@pytest.mark.slow
@pytest.mark.parametrize("launcher", [torchrun, deepspeed])
def test_a_rank_that_dies_ends_the_run_which_goes_on_from_its_checkpoint(start, launcher):
    run = start(launcher(), "output.checkpoint_every=2")
    run.wait_for(lambda: len(checkpoints(run.folder)) > 1)
    os.kill(run.ranks()[1], signal.SIGKILL)
    assert run.end() != 0
    status = read_status(run.folder)
    assert status["state"] == "failed" and "another rank is gone or hangs" in status["reason"], run.log.read_text()
    saved = int(checkpoints(run.folder)[-1].removeprefix("step-"))
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
    run = start(alone())
    run.wait_for_steps()
    log = run.log.read_text
    second = subprocess.run(
        [*alone(), str(run.folder / "config.yaml"), "resume=auto"], capture_output=True, text=True, check=False
    )
    assert second.returncode == 2 and "Traceback" not in second.stderr
    assert f"is in use by another run (last heard of as process {run.process.pid}" in second.stderr
    done = len(read_metrics(run.folder))
    run.wait_for_steps(done + 3)
    assert read_status(run.folder)["state"] == "running", log()


@pytest.mark.launcher
def test_a_run_that_ends_says_finished(start):
    run = start(alone(), "optim.epochs=2", "optim.warmup_epochs=0.5")
    assert run.end() == 0
    status = read_status(run.folder)
    assert status["state"] == "finished" and checkpoints(run.folder) == [f"step-{status['step']:08d}"]
    weights = load_file(run.folder / "checkpoints" / f"step-{status['step']:08d}" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())


STUCK = """
import sys, threading
from pathlib import Path
from iwm_fast import preemption
preemption.GRACE_S = 1.0
stop = preemption.OF_PROCESS
stop.listen(has_launcher=False)
stop.note_step(0.5)
stop.before_giving_up = lambda: preemption.write_status(Path(sys.argv[1]), "preempted", reason=stop.reason)
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


def test_a_failure_is_not_overwritten_by_the_preemption_it_brings(tmp_path):
    write_status(tmp_path, "running", step=3)
    write_status(tmp_path, "failed", step=4, reason="disk full")
    write_status(tmp_path, "preempted", step=4, reason="SIGTERM")
    assert read_status(tmp_path)["state"] == "failed" and read_status(tmp_path)["reason"] == "disk full"
    write_status(tmp_path, "running", step=4)
    assert read_status(tmp_path)["state"] == "running"
