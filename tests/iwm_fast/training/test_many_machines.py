"""Two machines simulated on one: a launcher is started twice, with one rank each, over the loopback device."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fixtures.launchers import CHILD_ENVIRONMENT, TOOLS, free_port
from fixtures.paths import PROJECT
from fixtures.tar_files import encode, photograph, write_tar
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.config.loading import save_config
from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.train import run

pytestmark = pytest.mark.launcher

EXAMPLES = PROJECT / "examples"


def is_free_port(number: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", number)) != 0


def deepspeed_launchers(folder: Path) -> list[list[str]]:
    hosts = folder / "hosts"
    hosts.write_text("node-0 slots=1\nnode-1 slots=1\n")
    address = ["--hostfile", str(hosts), "--no_ssh", "--master_addr", "127.0.0.1", "--master_port", free_port()]
    return [[str(TOOLS / "deepspeed"), *address, "--node_rank", node, "--module", "iwm_fast.train"] for node in "01"]


def torchrun_launchers(_: Path) -> list[list[str]]:
    address = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    return [[str(TOOLS / "torchrun"), *address, "--node-rank", node, "-m", "iwm_fast.train"] for node in "01"]


def start(machines: list[list[str]], settings: Path, log: Path) -> list[subprocess.Popen]:
    with log.open("w") as file:
        return [subprocess.Popen([*machine, str(settings)], stdout=file, stderr=file) for machine in machines]


def end(launchers: list[subprocess.Popen], timeout_s: float = 120) -> list[int]:
    try:
        return [launcher.wait(timeout=timeout_s) for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()


def written(config: RunConfig, folder: Path) -> Path:
    save_config(config, folder / "run.yaml")
    return folder / "run.yaml"


def losses(folder: Path) -> torch.Tensor:
    return torch.tensor([row["loss/prediction"] for row in read_metrics(folder)])


@pytest.fixture(scope="module")
def alone(tiny_shards, tmp_path_factory) -> torch.Tensor:
    folder = tmp_path_factory.mktemp("alone")
    run(tiny_run(tiny_shards, folder))
    return losses(folder)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [deepspeed_launchers, torchrun_launchers])
def test_two_machines_train_the_same_as_one_process(alone, tiny_shards, tmp_path, launcher):
    config = tiny_run(tiny_shards, tmp_path / "run", engine="deepspeed", zero_stage=2)
    log = tmp_path / "log"
    codes = end(start(launcher(tmp_path), written(config, tmp_path), log))
    assert codes == [0, 0], log.read_text()
    torch.testing.assert_close(losses(tmp_path / "run"), alone, rtol=1e-4, atol=1e-6)


def shard_with_a_bad_image(folder: Path) -> str:
    content = [encode(photograph("coffee.png")[start : start + 40, start : start + 40]) for start in range(48)]
    content[17] = content[17][: len(content[17]) // 2]
    write_tar(folder / "bad.tar", [(f"{number:02}.jpg", image) for number, image in enumerate(content)])
    return str(folder / "bad.tar")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [deepspeed_launchers, torchrun_launchers])
def test_an_error_on_one_rank_ends_all_machines_with_one_message(tiny_shards, tmp_path, launcher):
    config = tiny_run(tiny_shards, tmp_path / "run", engine="deepspeed", max_bad_samples=0.0)
    config = replace(config, data=replace(config.data, train=shard_with_a_bad_image(tmp_path)))
    log = tmp_path / "log"
    launchers = start(launcher(tmp_path), written(config, tmp_path), log)
    while "error (rank" not in log.read_text() and any(process.poll() is None for process in launchers):
        time.sleep(0.1)
    failed = time.perf_counter()
    codes = end(launchers)
    printed = log.read_text()
    assert time.perf_counter() - failed < 60 and 0 not in codes, printed
    assert printed.count("error (rank") == 1 and "bad.tar: sample '17': cannot decode the image" in printed
    assert printed.count("ends: another rank is gone or hangs") == 1 and "RuntimeError" not in printed, printed
    # torchrun prints a traceback when it ends.
    assert printed.count("Traceback") == (2 if launcher is torchrun_launchers else 0), printed


@pytest.fixture
def slurm(tmp_path) -> dict[str, str]:
    """Environment of a Slurm job with two tasks, in which PATH starts with substitutes for srun and scontrol."""
    substitutes = tmp_path / "bin"
    substitutes.mkdir()
    (substitutes / "srun").write_text(f"#!{sys.executable}\n{SRUN}")
    (substitutes / "scontrol").write_text(
        f'#!/bin/sh\nif [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> {tmp_path / "scontrol"}; fi\n'
    )
    for substitute in substitutes.iterdir():
        substitute.chmod(0o755)
    # The example derives its port from the number of the job.
    number = next(number for number in range(os.getpid() % 10_000, 20_000) if is_free_port(10_000 + number))
    job = {"SLURM_JOB_ID": str(number), "SLURM_JOB_NODELIST": "node-[0-1]", "SLURM_NTASKS": "2"}
    return os.environ | CHILD_ENVIRONMENT | job | {"PATH": f"{substitutes}:{TOOLS}:{os.environ['PATH']}"}


# What the example relies on: srun starts one process per task with its number in the environment, and forwards SIGUSR1.
SRUN = """
import os, signal, subprocess, sys
command = sys.argv[next(index for index, word in enumerate(sys.argv) if index and not word.startswith("--")):]
numbers = [{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)} for task in range(int(os.environ["SLURM_NTASKS"]))]
tasks = [subprocess.Popen(command, env=os.environ | number) for number in numbers]
signal.signal(signal.SIGUSR1, lambda signum, _: [task.send_signal(signum) for task in tasks])
sys.exit(max(abs(task.wait()) for task in tasks))
"""


def submit(config: RunConfig, folder: Path, environment: dict[str, str]) -> subprocess.Popen:
    command = ["bash", str(EXAMPLES / "slurm.sbatch"), str(written(config, folder)), "runtime.zero_stage=1"]
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


@pytest.mark.slow
def test_the_slurm_example_trains_the_same_as_one_process(alone, tiny_shards, tmp_path, slurm):
    config = tiny_run(tiny_shards, tmp_path / "run", engine="deepspeed")
    assert end([submit(config, tmp_path, slurm)]) == [0], (tmp_path / "log").read_text()
    torch.testing.assert_close(losses(tmp_path / "run"), alone, rtol=1e-4, atol=1e-6)
    assert not (tmp_path / "scontrol").exists()


def test_the_slurm_example_saves_and_requeues_before_the_time_limit(tiny_shards, tmp_path, slurm):
    config = tiny_run(tiny_shards, tmp_path / "run", engine="deepspeed")
    # The run would take hours without the signal.
    config = replace(config, optim=replace(config.optim, epochs=1e5))
    config = replace(config, output=replace(config.output, checkpoint_every=10**6))
    job = submit(config, tmp_path, slurm)
    while not read_metrics(tmp_path / "run") and job.poll() is None:
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    end([job])
    printed = (tmp_path / "log").read_text()
    assert (tmp_path / "scontrol").read_text() == f"requeue {slurm['SLURM_JOB_ID']}\n", printed
    assert checkpoints.find_newest_folder(tmp_path / "run") is not None, printed


def test_the_examples_are_written_correctly():
    subprocess.run(["bash", "-n", str(EXAMPLES / "slurm.sbatch")], check=True)
    hosts = [line for line in (EXAMPLES / "hostfile").read_text().splitlines() if not line.startswith("#")]
    assert hosts and all(len(host.split()) == 2 and host.split()[1].startswith("slots=") for host in hosts)
