"""The same run under the DeepSpeed launcher, under torchrun and in one process."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fixtures.launchers import deepspeed, one_process, tiny_yaml, torchrun
from fixtures.metric_rows import repeatable_rows
from fixtures.tar_files import encode, photograph, write_tar
from iwm_fast.monitoring.metrics import read_metrics

pytestmark = pytest.mark.launcher


@pytest.fixture(scope="module")
def run_yaml(tmp_path_factory, tiny_shards) -> Path:
    return tiny_yaml(tmp_path_factory.mktemp("launch") / "run.yaml", tiny_shards)


def start(launcher: list[str], path: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*launcher, str(path), *overrides], capture_output=True, text=True, check=False, timeout=300)


def trained(launcher: list[str], path: Path, folder: Path, *overrides: str) -> Path:
    done = start(launcher, path, f"output.folder={folder}", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def alone(run_yaml, tmp_path_factory) -> Path:
    return trained(one_process(), run_yaml, tmp_path_factory.mktemp("alone") / "run", "runtime.engine=plain")


@pytest.fixture(scope="module")
def launched(run_yaml, tmp_path_factory) -> Path:
    return trained(deepspeed(), run_yaml, tmp_path_factory.mktemp("zero") / "run", "runtime.zero_stage=1")


def losses(folder: Path) -> list[float]:
    return [row["loss/prediction"] for row in read_metrics(folder)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step-00000012" / "model.safetensors")


def test_two_deepspeed_ranks_train_the_same_as_one_process(alone, launched):
    torch.testing.assert_close(torch.tensor(losses(launched)), torch.tensor(losses(alone)), rtol=1e-4, atol=1e-6)
    assert json.loads((launched / "started.jsonl").read_text())["world_size"] == 2


def test_two_torchrun_ranks_train_the_same_as_one_process(alone, run_yaml, tmp_path):
    folder = trained(torchrun(), run_yaml, tmp_path / "run", "runtime.zero_stage=2", "runtime.micro_batch_size=4")
    torch.testing.assert_close(torch.tensor(losses(folder)), torch.tensor(losses(alone)), rtol=1e-4, atol=1e-6)


def stopped_at_5(run: Path, folder: Path) -> Path:
    """Copy a run without its checkpoints after step 5, which is in the middle of the second epoch."""
    stopped = shutil.copytree(run, folder)
    for name in ("step-00000010", "step-00000012"):
        shutil.rmtree(stopped / "checkpoints" / name)
    return stopped


def test_two_ranks_resume_bit_equal_in_the_middle_of_an_epoch(launched, run_yaml, tmp_path):
    assert_resumes_bit_equal(launched, run_yaml, tmp_path, "runtime.zero_stage=1")


def assert_resumes_bit_equal(run: Path, run_yaml: Path, tmp_path: Path, *settings: str) -> None:
    stopped = stopped_at_5(run, tmp_path / "run")
    trained(deepspeed(), run_yaml, stopped, *settings, "resume=auto")
    straight, resumed = weights(run), weights(stopped)
    assert all(torch.equal(value, resumed[name]) for name, value in straight.items())
    # A log row and a checkpoint do not coincide, so the second row covers steps before and after the restart.
    assert repeatable_rows(stopped) == repeatable_rows(run)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero_stage=0", "zero_stage=2", "zero_stage=3", "engine=plain"])
def test_every_engine_trains_the_same_and_resumes_bit_equal(alone, run_yaml, tmp_path, engine):
    settings = [f"runtime.{engine}", "runtime.micro_batch_size=4", "runtime.activation_checkpointing=true"]
    straight = trained(deepspeed(), run_yaml, tmp_path / "straight", *settings)
    torch.testing.assert_close(torch.tensor(losses(straight)), torch.tensor(losses(alone)), rtol=1e-4, atol=1e-6)
    teachers = [
        {name: value for name, value in weights(run).items() if "teacher/" in name} for run in (straight, alone)
    ]
    for name, value in teachers[1].items():
        torch.testing.assert_close(teachers[0][name], value, rtol=1e-5, atol=1e-6)
    assert_resumes_bit_equal(straight, run_yaml, tmp_path, *settings)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [["runtime.zero_stage=3"], ["runtime.zero_stage=0"], ["runtime.engine=plain"]])
def test_a_run_resumes_with_another_engine_and_another_number_of_ranks(launched, run_yaml, tmp_path, settings):
    for name, launcher in (("two", deepspeed()), ("one", one_process())):
        stopped = stopped_at_5(launched, tmp_path / name)
        trained(launcher, run_yaml, stopped, *settings, "resume=auto")
        assert losses(stopped) == pytest.approx(losses(launched), rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=absent.tar"], "absent.tar"),
        pytest.param(
            ["optim.global_batch_size=15"],
            "optim.global_batch_size must be a multiple of the 2 ranks, got 15",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_invalid_settings_give_one_message_under_the_launcher(run_yaml, tmp_path, overrides, message):
    done = start(deepspeed(), run_yaml, f"output.folder={tmp_path / 'run'}", *overrides)
    assert done.returncode != 0
    printed = done.stdout + done.stderr
    assert printed.count("error (rank") == 1 and message in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


WITHOUT_TENSORBOARD_ON_RANK_1 = """
import os, sys
if os.environ["RANK"] == "1":
    sys.modules["tensorboard"] = None
from iwm_fast.train import main
main()
"""


@pytest.mark.slow
def test_a_package_that_one_rank_lacks_makes_the_run_fail_and_not_preempted(run_yaml, tmp_path):
    script, folder = tmp_path / "train.py", tmp_path / "run"
    script.write_text(WITHOUT_TENSORBOARD_ON_RANK_1)
    done = start(torchrun(target=str(script)), run_yaml, f"output.folder={folder}", "runtime.zero_stage=1")
    assert done.returncode != 0 and done.stderr.count("error (rank 1)") == 1, done.stderr
    status = json.loads((folder / "status.json").read_text())
    assert status["state"] == "failed" and "tensorboard" in status["reason"], done.stderr


@pytest.mark.slow
def test_two_ranks_train_although_one_sample_in_a_hundred_is_bad(run_yaml, tmp_path):
    jpeg = [encode(photograph("coffee.png")[number : number + 64, number : number + 64]) for number in range(100)]
    jpeg[17], jpeg[60] = jpeg[17][: len(jpeg[17]) // 2], b"<html>not found</html>"
    for shard in range(2):
        members = [
            (f"{shard}-{number:02}.jpg", content) for number, content in enumerate(jpeg) if number != 17 or shard
        ]
        write_tar(tmp_path / f"{shard}.tar", members)
    settings = [f"data.train={tmp_path}/{{0..1}}.tar", "optim.epochs=1", "optim.warmup_epochs=0.5"]
    done = start(deepspeed(), run_yaml, f"output.folder={tmp_path / 'run'}", "output.log_every=1", *settings)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert printed.count("finished at step ") == 1, "only rank 0 tells how the run ended"
    bad = ("0.tar:0-60", "1.tar:1-17", "1.tar:1-60")
    assert all(printed.count(f"cannot decode {tmp_path}/{name}") == 1 for name in bad), printed
    assert sum(row["data/replaced_samples"] for row in read_metrics(tmp_path / "run")) == 3
    # How many bad samples a rank meets depends on the order, so the limit is 0.
    done = start(deepspeed(), run_yaml, f"output.folder={tmp_path / 'strict'}", "runtime.max_bad_samples=0", *settings)
    printed = done.stdout + done.stderr
    assert done.returncode != 0 and "bad sample 1 and runtime.max_bad_samples = 0 allows 0 per rank" in printed
    assert any(f"{name[:5]}: sample '{name[6:]}'" in printed for name in bad)


@pytest.mark.slow
def test_the_demo_runs_in_one_command_and_does_not_train_twice(tmp_path):
    overrides = [
        "optim.epochs=0.5",
        "optim.warmup_epochs=0.1",
        f"output.folder={tmp_path / 'run'}",
        "output.log_every=8",
    ]
    overrides += [
        f"data.{split}={tmp_path}/data/{split}-{{000000..{last}}}.tar"
        for split, last in (("train", "000007"), ("val", "000001"))
    ]
    command = [sys.executable, "-m", "iwm_fast.cli", "demo", *overrides]
    first = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert first.returncode == 0, first.stdout + first.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {
        "mrr",
        "mrr_chance",
        "mrr_untrained",
        "mrr_difference",
        "mrr_default_bank_difference_untrained",
        "knn",
        "knn_untrained",
        "images_per_s",
        "wait_share",
    } <= summary.keys()
    assert summary["psnr_db"].keys() == {"clean", "changed"} and min(summary["psnr_db"].values()) > 10
    assert list((tmp_path / "run" / "decoder").glob("*.safetensors"))
    second = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "--module" in first.stdout and "--module" not in second.stdout
    assert "[INFO]" not in first.stdout + first.stderr and "evaluation 6 of 6: " in first.stdout
    assert second.stdout.splitlines()[-5:] == first.stdout.splitlines()[-5:]
