"""Whole runs as processes of their own: how each launcher starts a tiny one, and how all of it is found and ended."""

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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from iwm_fast.metrics import read_metrics

TOOLS = Path(sys.executable).parent
# a launcher's own 30 s before it kills, and room for two busy cores
PATIENCE_S = 120
TRAIN = "iwm_fast.train"
WATCHED = str(Path(__file__).parent / "iwm_fast" / "watched_train.py")


def tiny_yaml(path: Path, shards, **groups: dict[str, Any]) -> Path:
    """Write the settings of a run that takes milliseconds a step; groups are merged over them."""
    settings: dict[str, dict[str, Any]] = {
        "data": {"train": shards.pattern, "val": shards.pattern, "shuffle_window": 2},
        "views": {"size": 16, "blur_sigma": [0.1, 1.0]},
        "model": {"encoder": {"dim": 32, "depth": 2, "num_heads": 2, "patch_size": 4},
                  "predictor": {"dim": 16, "depth": 1, "num_heads": 1}},
        "optim": {"global_batch_size": 16, "epochs": 4, "warmup_epochs": 1, "precision": "fp32"},
        "runtime": {"device": "cpu"},
        "output": {"log_every": 4, "checkpoint_every": 5},
    }  # fmt: skip
    for name, values in groups.items():
        settings[name] |= values
    path.write_text(yaml.safe_dump(settings))
    return path


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def one_process(target: str = "") -> list[str]:
    """Start one process of a script, or of the command."""
    return [sys.executable, *([target] if target else ["-m", "iwm_fast.cli", "train"])]


def torchrun(*options: str, target: str = TRAIN) -> list[str]:
    """Start two ranks, or as many as the options say, of a module or of a script."""
    module = [] if target.endswith(".py") else ["-m"]
    place = ["--nproc-per-node", "2", "--master-port", free_port()]
    return [str(TOOLS / "torchrun"), *place, *options, *module, target]


def deepspeed(*options: str, target: str = TRAIN) -> list[str]:
    """Do the same with DeepSpeed's launcher, which starts its launch process, which starts the ranks."""
    module = [] if target.endswith(".py") else ["--module"]
    place = ["--num_accelerators", "2", "--master_port", free_port()]
    return [str(TOOLS / "deepspeed"), *place, *options, *module, target]


def launch_process(target: str = TRAIN) -> list[str]:
    """Start DeepSpeed's launch process alone, as a scheduler may."""
    module = [] if target.endswith(".py") else ["--module"]
    world = base64.urlsafe_b64encode(json.dumps({"localhost": [0, 1]}).encode()).decode()
    place = ["--world_info", world, "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    return [sys.executable, "-m", "deepspeed.launcher.launch", *place, *module, target]


class Started:
    """A run whose processes all carry a mark, so that everything it leaves behind can be found."""

    def __init__(self, command: list[str], *, folder: Path, environment: dict[str, str] | None = None) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.mark = f"IWM_TEST_RUN={uuid.uuid4().hex}"
        own = {"OMP_NUM_THREADS": "1", **(environment or {}), **dict([self.mark.split("=")])}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, f"output.folder={folder}"],
                stdout=log, stderr=subprocess.STDOUT, env=os.environ | own, start_new_session=True,
            )  # fmt: skip

    def processes(self) -> dict[str, int]:
        """Return the process ids of what runs: launcher, launch process, rank 0, rank 1."""
        named = {_role(command, environment): process for process, command, environment in self._found()}
        return {"launcher": self.process.pid} | {name: process for name, process in named.items() if name}

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks, in their order."""
        named = self.processes()
        return [named[name] for name in sorted(named) if name.startswith("rank ")]

    def wait_for(self, condition: Callable[[], bool], *, every_s: float = 0.02) -> None:
        """Wait while any of its processes runs, whether its launcher does or not."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            is_over = self.process.poll() is not None and not self._found()
            assert not is_over and time.monotonic() < deadline, self.log.read_text()
            time.sleep(every_s)

    def wait_for_steps(self, count: int = 3) -> None:
        self.wait_for(lambda: len(read_metrics(self.folder)) >= count)

    def end(self) -> int:
        """Wait for the end of everything, and return the exit code of what was started."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None or self._found():
            left = [command for _, command, _ in self._found()]
            assert time.monotonic() < deadline, f"{left} {self.log.read_text()}"
            time.sleep(0.1)
        return self.process.returncode

    def kill(self) -> None:
        """Kill all of it at once, also what a process starts meanwhile."""
        while found := self._found():
            for process, _, _ in found:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        self.process.wait()

    def _found(self) -> list[tuple[int, bytes, bytes]]:
        rows = []
        for entry in Path("/proc").glob("[0-9]*"):
            # it may be gone by now, or not be ours
            with suppress(OSError):
                command, environment = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
                # what ended has no command line any more
                if command and self.mark.encode() in environment:
                    rows.append((int(entry.name), command, environment))
        return rows


def _role(command: bytes, environment: bytes) -> str:
    if b"deepspeed.launcher.launch" in command:
        return "launch process"
    rank = re.search(rb"(?:^|\0)RANK=(\d+)", environment)
    # not what a rank asks for the commit
    return f"rank {int(rank[1])}" if rank and b"output.folder=" in command else ""


@contextmanager
def starting(settings: Path, folder: Path) -> Iterator[Callable[..., Started]]:
    """Yield what starts runs in a folder, by launcher, overrides and environment; kill what is left of them."""
    runs: list[Started] = []

    def start(launcher: list[str], *overrides: str, **environment: str) -> Started:
        runs.append(Started([*launcher, str(settings), *overrides], folder=folder, environment=environment))
        return runs[-1]

    try:
        yield start
    finally:
        for run in runs:
            run.kill()


def catches(process: int, number: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal."""
    mask = re.search(rb"SigCgt:\s*([0-9a-f]+)", Path(f"/proc/{process}/status").read_bytes())
    return mask is not None and bool(int(mask[1], 16) >> (number - 1) & 1)


def checkpoints_in(folder: Path) -> list[str]:
    """Return the names of the checkpoints that are published."""
    return sorted(path.parent.name for path in (folder / "checkpoints").glob("step-*/manifest.json"))
