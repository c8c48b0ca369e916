"""A run that is killed repeatedly, at any moment, ends bit-equal to an uninterrupted one."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fixtures.launchers import run_starter, tiny_yaml, torchrun
from fixtures.paths import PYTHONPATH, WORKERS
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines.action_log.files import read_rows
from iwm_fast.runtime.run_status import read_status

pytestmark = [pytest.mark.launcher, pytest.mark.timeout(900)]

STEPS_PER_EPOCH = 3


def settings(path: Path, shards, epochs: int) -> Path:
    """Write the settings of a run that spends most of its time saving."""
    return tiny_yaml(
        path,
        shards,
        optim={"epochs": epochs},
        runtime={"loader_threads": 1},
        output={"log_every": 1, "checkpoint_every": 1, "keep_last": 2, "action_log": True},
    )


def assert_equal_ends(killed: Path, straight: Path, steps: int) -> None:
    """Compare weights, optimiser state, teacher, counters, losses and the action logs of two runs."""
    ends = [checkpoints.read(checkpoints.find_newest_folder(folder)) for folder in (killed, straight)]
    for attribute in ("engine_state", "teacher_state"):
        first, second = (getattr(end, attribute) for end in ends)
        assert first.keys() == second.keys()
        assert not [name for name, value in second.items() if not torch.equal(value, first[name])]
    streams = [end.counters["stream"] for end in ends]
    assert [(end.step, end.applied_steps) for end in ends] == 2 * [(steps, steps)] and streams[0] == streams[1]
    losses = [[(row["step"], row["loss/prediction"]) for row in read_metrics(folder)] for folder in (killed, straight)]
    assert losses[0] == losses[1] and [step for step, _ in losses[0]] == list(range(1, steps + 1))
    rows = [read_rows(folder / "actions", 0, steps) for folder in (killed, straight)]
    assert rows[0].equals(rows[1])
    assert read_status(killed)["state"] == "finished"
    assert not list((killed / "checkpoints").glob(".unfinished-*"))


@pytest.mark.slow
def test_a_run_killed_at_random_ends_bit_equal_to_an_uninterrupted_one(tiny_shards, tmp_path):
    num_kills, epochs, seed = 20, 34, 0
    run_yaml = settings(tmp_path / "run.yaml", tiny_shards, epochs)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = [
        sys.executable,
        str(WORKERS / "killed_run.py"),
        str(run_yaml),
        str(straight),
        str(killed),
    ]
    done = subprocess.run(
        [*command, str(num_kills), str(seed)], capture_output=True, text=True, check=False, timeout=800
    )
    assert done.returncode == 0, done.stderr
    kills = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(kills) == num_kills and not any(kill["had_ended"] for kill in kills), (kills, done.stderr)
    # A published checkpoint is complete, whatever the run was doing when it was killed.
    assert not any(kill["refused"] for kill in kills), kills
    newest = [kill["newest"] for kill in kills]
    assert newest == sorted(newest) and newest[-1] > newest[0], kills
    assert all(kill["num_unfinished"] <= 1 for kill in kills), "unfinished checkpoints of killed runs are deleted"
    assert sum(kill["num_unfinished"] for kill in kills) >= 5, "many runs were killed while they saved"
    assert_equal_ends(killed, straight, epochs * STEPS_PER_EPOCH)


# Wall-clock times and memory are never the same twice.
NOT_REPEATED = ("time/", "speed/", "data/wait_", "memory/")
# Checkpoints are written in every step, so most signals arrive inside a log window.
LOG_EVERY = 3


def repeated_rows(folder: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in row.items() if not name.startswith(NOT_REPEATED)}
        for row in read_metrics(folder)
    ]


# A minute or two on idle cores.
@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["pretrain", "finetune"])
def test_a_run_signalled_at_random_ends_like_an_uninterrupted_one(tiny_shards, tmp_path, kind):
    seed = int(os.environ.get("IWM_TEST_SEED", "0"))
    command = [sys.executable, str(WORKERS / "signalled_run.py"), kind, tiny_shards.pattern, str(tmp_path)]
    done = subprocess.run(
        [*command, "20", str(seed), str(LOG_EVERY)], capture_output=True, text=True, check=False, timeout=1700,
        env=os.environ | {"PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    # A run that ends prints, too.
    signals = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    story = "\n".join([f"seed {seed}", *map(str, signals), done.stderr])
    assert done.returncode == 0 and len(signals) == 20, story
    assert not any(row["had_ended"] or row["refused"] for row in signals), story
    newest = [row["newest"] for row in signals]
    assert newest == sorted(newest) and newest[-1] > newest[0], story
    for row in signals:
        if row["status"].get("state") == "preempted":
            assert row["status"].get("step", row["newest"]) == row["newest"], (row, story)
    ends = ["straight", "signalled"]
    straight, signalled = (tmp_path / name / ("toy" if kind == "finetune" else "") for name in ends)
    assert read_status(signalled)["state"] == "finished", story
    first, second = (checkpoints.read(checkpoints.find_newest_folder(folder)) for folder in (straight, signalled))
    for attribute in ("engine_state", "teacher_state"):
        expected, actual = getattr(first, attribute), getattr(second, attribute)
        assert not [name for name, value in expected.items() if not torch.equal(value, actual[name])], story
    assert repeated_rows(signalled) == repeated_rows(straight), story


def newest_step(folder: Path) -> int:
    newest = checkpoints.find_newest_folder(folder)
    return checkpoints.parse_step(newest) if newest else 0


@pytest.mark.slow
def test_two_ranks_killed_while_saving_end_bit_equal_to_uninterrupted_ones(tiny_shards, tmp_path):
    epochs = 10
    run_yaml = settings(tmp_path / "run.yaml", tiny_shards, epochs)
    moments, killed = random.Random(0), tmp_path / "killed"
    with run_starter(run_yaml, killed) as start:
        for goal in (3, 9):
            run = start(torchrun(), "resume=auto")
            run.wait_for(lambda goal=goal: newest_step(killed) >= goal)
            run.wait_for(lambda: bool(list((killed / "checkpoints").glob(".unfinished-*"))), every_s=0.0005)
            time.sleep(moments.uniform(0.0, 0.01))
            run.kill()
            saved, refused = checkpoints.read_newest(killed)
            assert not refused and goal <= saved.step < epochs * STEPS_PER_EPOCH
        assert start(torchrun(), "resume=auto").end() == 0
    with run_starter(run_yaml, tmp_path / "straight") as start:
        assert start(torchrun()).end() == 0
    assert_equal_ends(killed, tmp_path / "straight", epochs * STEPS_PER_EPOCH)
