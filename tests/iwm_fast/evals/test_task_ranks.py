"""Multitask, segmentation and pixel decoder on two ranks give the results of one rank, with all engines."""

import os
import re
import subprocess
import sys

import pytest

from fixtures.launchers import CHILD_ENVIRONMENT, free_port
from fixtures.painted_shards import pretrain_on_painted_shards
from fixtures.paths import PYTHONPATH, WORKERS

WORKER = WORKERS / "ranks_tasks.py"


def start_rank(rank: int, world_size: int, port: str, arguments: list[str]) -> subprocess.Popen:
    environment = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port, "PYTHONPATH": PYTHONPATH,
    }  # fmt: skip
    command = [sys.executable, str(WORKER), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | CHILD_ENVIRONMENT | environment, **pipes)


def measure_rows(world_size: int, *arguments: str) -> list[str]:
    """Run the worker on these ranks and return the printed rows, which must be the same on all ranks."""
    port = free_port()
    ranks = [start_rank(rank, world_size, port, list(arguments)) for rank in range(world_size)]
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, outputs
    printed = [[line for line in out.splitlines() if line.startswith("Row(")] for out, _ in outputs]
    assert all(lines == printed[0] for lines in printed) and len(printed[0]) == 16
    return printed[0]


def parse_values(lines: list[str]) -> list[float]:
    return [float(re.search(r"value=([\d.]+)", line)[1]) for line in lines]


@pytest.mark.multi_rank
@pytest.mark.slow
def test_two_ranks_give_the_results_of_one(tmp_path):
    folder = pretrain_on_painted_shards(tmp_path)
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("left: {label: cls}\nred: {label: json.red}\n")
    alone = measure_rows(1, folder, str(tasks), "alone")
    plain = measure_rows(2, folder, str(tasks), "plain", "micro_batch_size=2")
    sharded = measure_rows(2, folder, str(tasks), "sharded", "engine=deepspeed", "zero_stage=3")
    for lines in (plain, sharded):
        # Sums in another order can change the predicted class of single pixels or images.
        assert parse_values(lines) == pytest.approx(parse_values(alone), abs=0.06)
    assert [line.split("value=")[0] for line in plain] == [line.split("value=")[0] for line in alone]
