"""Finetuning as a process of its own, alone and on two ranks: the outcome of one, and going on when it was stopped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fixtures.launchers import CHILD, PATIENCE_S, deepspeed, torchrun
from fixtures.tinted_shards import tinted_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.runtime.preemption import EXIT_PREEMPTED
from iwm_fast.runtime.run_status import read_status

TARGET = "iwm_fast.evaluate"
FOLDER = "finetune_json.look.tint"
QUIET = ("augment.mixup=0", "augment.cutmix=0", "augment.erasing=0", "tune.drop_path=0")
ALONE = (sys.executable, "-m", TARGET)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return tinted_run(tmp_path_factory.mktemp("tinted"))


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def arguments(run, *more):
    return [
        "finetune", f"run={run}", "data.label=json.look.tint", "runtime.device=cpu", "runtime.loader=torch",
        "augment.rand_augment=false", "tune.global_batch_size=8", "tune.epochs=2", "tune.warmup_epochs=0.5",
        "tune.lr=0.005", "tune.precision=fp32", "log_every=1", *more,
    ]  # fmt: skip


def begin(launcher, run, *more, log):
    with log.open("a") as file:
        command = [*launcher, *arguments(run, *more)]
        environment = os.environ | CHILD
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def finish(launcher, run, *more, log, code=0):
    process = begin(launcher, run, *more, log=log)
    try:
        assert process.wait(PATIENCE_S) == code, log.read_text()
    finally:
        process.kill()


def rows(run, name=FOLDER):
    found = json.loads((run / "evaluations" / f"{name}.json").read_text())["rows"]
    return [row | {"time_s": None, "images_per_s": None} for row in found]


def losses(run, arm, name=FOLDER):
    return [row["loss/train"] for row in read_metrics(run / "evaluations" / name / arm)]


def state(run, arm, name=FOLDER):
    return checkpoints.read(checkpoints.newest(run / "evaluations" / name / arm)).engine_state


@pytest.mark.multi_rank
@pytest.mark.parametrize(
    ("engine", "stage"),
    [("deepspeed", 3), ("deepspeed", 1), *(
        pytest.param(*row, marks=pytest.mark.slow) for row in (("plain", None), ("deepspeed", 0), ("deepspeed", 2))
    )],
)  # fmt: skip
def test_two_ranks_train_and_measure_what_one_does(run, tmp_path, engine, stage):
    kept = [f"runtime.engine={engine}", *([f"runtime.zero_stage={stage}"] if stage is not None else [])]
    # small parameters would stay whole on every rank
    kept += ["runtime.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"] if stage == 3 else []
    asked = ["arms=end_to_end,predictor", *QUIET]
    finish(ALONE, run, *asked, "runtime.engine=plain", log=tmp_path / "alone.log")
    finish(torchrun(target=TARGET), run, *asked, *kept, "name=ranks", log=tmp_path / "ranks.log")
    for arm in ("end_to_end", "predictor"):
        assert losses(run, arm, f"{FOLDER}_ranks") == pytest.approx(losses(run, arm), rel=1e-4), arm
        for name, weight in state(run, arm, f"{FOLDER}_ranks").items():
            if name.startswith("weight/"):
                torch.testing.assert_close(weight, state(run, arm)[name], rtol=1e-3, atol=1e-4)
    assert rows(run, f"{FOLDER}_ranks") == rows(run)
    shown = (tmp_path / "ranks.log").read_text()
    assert shown.count("accuracy") >= 2 and shown.count(f"{FOLDER}_ranks, step") == 1, "one table, of rank 0"


def wait_for(process, condition, log):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


@pytest.mark.launcher
def test_a_process_told_to_stop_goes_on_bit_equal_with_everything_drawn(run, tmp_path):
    # no beartype there: erasing, too, follows from the seed alone
    asked = ["arms=end_to_end", "augment.erasing=0.5", "tune.drop_path=0.3", "tune.epochs=12"]
    finish(ALONE, run, *asked, "name=straight", log=tmp_path / "straight.log")
    log = tmp_path / "stopped.log"
    process = begin(ALONE, run, *asked, log=log)
    arm = run / "evaluations" / FOLDER / "end_to_end"
    wait_for(process, lambda: len(read_metrics(arm)) >= 5, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_S) == EXIT_PREEMPTED, log.read_text()
    status = read_status(arm)
    assert status["state"] == "preempted" and 5 <= status["step"] < 72, status
    assert "run the same command again to resume" in log.read_text()
    finish(ALONE, run, *asked, log=log)
    first, second = state(run, "end_to_end"), state(run, "end_to_end", f"{FOLDER}_straight")
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert losses(run, "end_to_end") == losses(run, "end_to_end", f"{FOLDER}_straight")


@pytest.mark.launcher
@pytest.mark.slow
def test_two_ranks_under_deepspeed_go_on_bit_equal(run, tmp_path):
    asked = ["arms=end_to_end", "augment.erasing=0.5", "tune.drop_path=0.3", "tune.epochs=20", "runtime.zero_stage=2"]
    finish(deepspeed(target=TARGET), run, *asked, "name=straight", log=tmp_path / "straight.log")
    log = tmp_path / "stopped.log"
    process = begin(deepspeed(target=TARGET), run, *asked, log=log)
    arm = run / "evaluations" / FOLDER / "end_to_end"
    wait_for(process, lambda: len(read_metrics(arm)) >= 5, log)
    # the pid that rank 0 left; whichever rank is told, all stop
    os.kill(read_status(arm)["pid"], signal.SIGUSR1)
    assert process.wait(PATIENCE_S) == EXIT_PREEMPTED, log.read_text()
    assert read_status(arm)["state"] == "preempted"
    finish(deepspeed(target=TARGET), run, *asked, log=log)
    first, second = state(run, "end_to_end"), state(run, "end_to_end", f"{FOLDER}_straight")
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.launcher
def test_a_fault_of_the_settings_is_one_message_on_many_ranks(run, tmp_path):
    log = tmp_path / "ranks.log"
    process = begin(torchrun(target=TARGET), run, "tune.global_batch_size=9", log=log)
    assert process.wait(PATIENCE_S) != 0
    assert log.read_text().count("tune.global_batch_size must be a multiple of the 2 ranks, got 9") == 1
