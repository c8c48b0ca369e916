"""Finetuning in processes, on one and two ranks: equal results, and resuming after a stop."""

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

from fixtures.launchers import CHILD_ENVIRONMENT, TIMEOUT_S, deepspeed, torchrun
from fixtures.tinted_shards import pretrain_on_tinted_shards
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
    return pretrain_on_tinted_shards(tmp_path_factory.mktemp("tinted"))


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def arguments(run, *more):
    return [
        "finetune", f"run={run}", "data.label=json.look.tint", "runtime.device=cpu", "runtime.loader=torch",
        "augment.rand_augment=false", "tune.global_batch_size=8", "tune.epochs=2", "tune.warmup_epochs=0.5",
        "tune.lr=0.005", "tune.precision=fp32", "log_every=1", *more,
    ]  # fmt: skip


def start(launcher, run, *more, log):
    with log.open("a") as file:
        command = [*launcher, *arguments(run, *more)]
        environment = os.environ | CHILD_ENVIRONMENT
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)


def run_to_end(launcher, run, *more, log, code=0):
    process = start(launcher, run, *more, log=log)
    try:
        assert process.wait(TIMEOUT_S) == code, log.read_text()
    finally:
        process.kill()


def rows_without_times(run, name=FOLDER):
    rows = json.loads((run / "evaluations" / f"{name}.json").read_text())["rows"]
    return [row | {"time_s": None, "images_per_s": None} for row in rows]


def losses(run, variant, name=FOLDER):
    return [row["loss/train"] for row in read_metrics(run / "evaluations" / name / variant)]


def state(run, variant, name=FOLDER):
    return checkpoints.read(checkpoints.find_newest_folder(run / "evaluations" / name / variant)).engine_state


@pytest.mark.slow
@pytest.mark.multi_rank
@pytest.mark.parametrize(
    ("engine", "stage"),
    [("plain", None), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)],
)
def test_two_ranks_give_the_same_result_as_one(run, tmp_path, engine, stage):
    engine_options = [f"runtime.engine={engine}", *([f"runtime.zero_stage={stage}"] if stage is not None else [])]
    # Below the threshold, parameters would not be sharded.
    engine_options += ["runtime.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"] if stage == 3 else []
    options = ["arms=end_to_end,predictor", *QUIET]
    run_to_end(ALONE, run, *options, "runtime.engine=plain", log=tmp_path / "alone.log")
    run_to_end(torchrun(target=TARGET), run, *options, *engine_options, "name=ranks", log=tmp_path / "ranks.log")
    for variant in ("end_to_end", "predictor"):
        assert losses(run, variant, f"{FOLDER}_ranks") == pytest.approx(losses(run, variant), rel=1e-4), variant
        for name, weight in state(run, variant, f"{FOLDER}_ranks").items():
            if name.startswith("weight/"):
                torch.testing.assert_close(weight, state(run, variant)[name], rtol=1e-3, atol=1e-4)
    assert rows_without_times(run, f"{FOLDER}_ranks") == rows_without_times(run)
    log = (tmp_path / "ranks.log").read_text()
    assert log.count("accuracy") >= 2 and log.count(f"{FOLDER}_ranks, step") == 1, "only rank 0 prints a table"


def wait_for(process, condition, log):
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.01)


@pytest.mark.launcher
@pytest.mark.slow
def test_a_stopped_process_resumes_bit_equal_with_all_augmentation(run, tmp_path):
    # Without beartype, which tests in this process use, erasing depends only on the seed.
    options = ["arms=end_to_end", "augment.erasing=0.5", "tune.drop_path=0.3", "tune.epochs=12"]
    run_to_end(ALONE, run, *options, "name=uninterrupted", log=tmp_path / "uninterrupted.log")
    log = tmp_path / "stopped.log"
    process = start(ALONE, run, *options, log=log)
    folder = run / "evaluations" / FOLDER / "end_to_end"
    wait_for(process, lambda: len(read_metrics(folder)) >= 5, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == EXIT_PREEMPTED, log.read_text()
    status = read_status(folder)
    assert status["state"] == "preempted" and 5 <= status["step"] < 72, status
    assert "the same command" in log.read_text()
    run_to_end(ALONE, run, *options, log=log)
    first, second = state(run, "end_to_end"), state(run, "end_to_end", f"{FOLDER}_uninterrupted")
    assert all(torch.equal(first[name], second[name]) for name in second)
    assert losses(run, "end_to_end") == losses(run, "end_to_end", f"{FOLDER}_uninterrupted")


@pytest.mark.launcher
@pytest.mark.slow
def test_two_ranks_under_deepspeed_resume_bit_equal(run, tmp_path):
    options = ["arms=end_to_end", "augment.erasing=0.5", "tune.drop_path=0.3", "tune.epochs=20", "runtime.zero_stage=2"]
    run_to_end(deepspeed(target=TARGET), run, *options, "name=uninterrupted", log=tmp_path / "uninterrupted.log")
    log = tmp_path / "stopped.log"
    process = start(deepspeed(target=TARGET), run, *options, log=log)
    folder = run / "evaluations" / FOLDER / "end_to_end"
    wait_for(process, lambda: len(read_metrics(folder)) >= 5, log)
    # The process id is rank 0's; all ranks stop, whichever rank gets the signal.
    os.kill(read_status(folder)["pid"], signal.SIGUSR1)
    assert process.wait(TIMEOUT_S) == EXIT_PREEMPTED, log.read_text()
    assert read_status(folder)["state"] == "preempted"
    run_to_end(deepspeed(target=TARGET), run, *options, log=log)
    first, second = state(run, "end_to_end"), state(run, "end_to_end", f"{FOLDER}_uninterrupted")
    assert all(torch.equal(first[name], second[name]) for name in second)


@pytest.mark.slow
@pytest.mark.launcher
def test_invalid_settings_are_reported_once_by_all_ranks_together(run, tmp_path):
    log = tmp_path / "ranks.log"
    process = start(torchrun(target=TARGET), run, "tune.global_batch_size=9", log=log)
    assert process.wait(TIMEOUT_S) != 0
    assert log.read_text().count("tune.global_batch_size must be a multiple of the 2 ranks, got 9") == 1
