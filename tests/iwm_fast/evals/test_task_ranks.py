"""Multitask and segmentation on two ranks give what one rank gives, under every engine."""

import os
import re
import socket
import subprocess
import sys

import pytest

from fixtures.launchers import CHILD
from fixtures.painted_shards import painted_run
from fixtures.paths import PYTHONPATH, WORKERS

WORKER = WORKERS / "ranks_tasks.py"


def start_rank(rank: int, world_size: int, port: int, arguments: list[str]) -> subprocess.Popen:
    environment = {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "PYTHONPATH": PYTHONPATH,
    }  # fmt: skip
    command = [sys.executable, str(WORKER), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=os.environ | CHILD | environment, **pipes)


def rows(world_size: int, *arguments: str) -> list[str]:
    """Return the rows that all ranks print alike."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start_rank(rank, world_size, port, list(arguments)) for rank in range(world_size)]
    said = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size, said
    printed = [[line for line in out.splitlines() if line.startswith("Row(")] for out, _ in said]
    assert all(lines == printed[0] for lines in printed) and len(printed[0]) == 12
    return printed[0]


def values(lines: list[str]) -> list[float]:
    return [float(re.search(r"value=([\d.]+)", line)[1]) for line in lines]


@pytest.mark.multi_rank
@pytest.mark.slow
def test_two_ranks_measure_what_one_measures(tmp_path):
    folder = painted_run(tmp_path)
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text("left: {label: cls}\nred: {label: json.red}\n")
    alone = rows(1, folder, str(tasks), "alone")
    plain = rows(2, folder, str(tasks), "plain", "micro_batch_size=2")
    sharded = rows(2, folder, str(tasks), "sharded", "engine=deepspeed", "zero_stage=3")
    for found in (plain, sharded):
        # sums of other order: a pixel or an image may fall on the other side
        assert values(found) == pytest.approx(values(alone), abs=0.06)
    assert [line.split("value=")[0] for line in plain] == [line.split("value=")[0] for line in alone]
