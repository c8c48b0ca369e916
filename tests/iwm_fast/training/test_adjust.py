"""Optimiser settings that change in the middle of a run, with resume=adjust."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fixtures.tiny_pretraining import tiny_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.commands.report_run import write_run_report
from iwm_fast.config.fingerprint import ADJUSTABLE, fingerprint
from iwm_fast.config.loading import build, config_to_dict
from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.runtime.json_lines import read_starts
from iwm_fast.train import run
from iwm_fast.training import pretraining
from iwm_fast.training.resume import resumed_state
from iwm_fast.training.schedules import Schedules
from iwm_fast.training.train_state import TrainState

# Twelve steps are four epochs; the checkpoint lies in the middle of the second one.
STOP = 5
ADJUSTMENTS = {
    "optim.lr": "1e-4",
    "optim.lr_start": "1e-5",
    "optim.lr_end": "1e-7",
    "optim.warmup_epochs": "2",
    "optim.weight_decay": "[0.1,0.2]",
    "optim.teacher_momentum": "[0.9,0.95]",
    "optim.clip_norm": "null",
    "optim.epochs": "5",
}
REFUSED = {
    "seed": "1",
    "data.shuffle_window": "3",
    "data.max_samples": "32",
    "views.jitter.brightness": "0.1",
    "mask.num_target_blocks": "3",
    "model.predictor.conditioning": "sequence",
    "model.encoder.depth": "3",
    "objective.distance": "smooth_l1",
    "optim.global_batch_size": "8",
    "optim.betas": "[0.8,0.9]",
    "optim.schedule_stretch": "1.5",
    "optim.precision": "bf16",
    "init_from": "elsewhere",
}


def override(config: RunConfig, *settings: str) -> RunConfig:
    return build(RunConfig, config_to_dict(config), settings)


@pytest.fixture(scope="module")
def stopped(tiny_shards, tmp_path_factory) -> RunConfig:
    """Train a run, and delete all checkpoints but that of step 5."""
    config = tiny_run(tiny_shards, tmp_path_factory.mktemp("stopped") / "run")
    run(config)
    for folder in checkpoints.list_checkpoint_folders(Path(config.output.folder))[1:]:
        shutil.rmtree(folder)
    return config


@pytest.fixture
def copied(stopped, tmp_path) -> RunConfig:
    shutil.copytree(stopped.output.folder, tmp_path / "run")
    return override(stopped, f"output.folder={tmp_path / 'run'}", "resume=auto")


def newest(config: RunConfig) -> checkpoints.Checkpoint:
    return checkpoints.read(checkpoints.find_newest_folder(Path(config.output.folder)))


def test_the_adjustments_cover_the_list():
    assert ADJUSTMENTS.keys() == set(ADJUSTABLE)


def resume(config: RunConfig) -> TrainState:
    """Compare the settings with those of the newest checkpoint, as a start does, without training."""
    saved = newest(config)
    return resumed_state(saved, config, fingerprint(config, saved.fingerprint["data.train"]), 48)


@pytest.mark.parametrize("name", ADJUSTMENTS)
def test_a_changed_setting_is_refused_with_both_values_and_the_way(stopped, name):
    config = override(stopped, f"{name}={ADJUSTMENTS[name]}")
    way = "extend" if name == "optim.epochs" else "adjust"
    with pytest.raises(CheckpointError, match=rf"(?s)  {name}: .+ -> .+resume={way} continues with .* otherwise"):
        resume(config)
    assert [change["setting"] for change in resume(override(config, "resume=adjust")).changes] == [name]


@pytest.mark.parametrize("name", REFUSED)
def test_other_settings_stay_refused(stopped, name):
    with pytest.raises(CheckpointError, match=rf"(?s)  {name}: .+ -> .+set them back"):
        resume(override(stopped, f"{name}={REFUSED[name]}", "optim.lr=1e-4", "resume=adjust"))


def test_a_refused_start_leaves_the_folder_unchanged(copied):
    before = sorted(Path(copied.output.folder).rglob("*"))
    with pytest.raises(CheckpointError, match=r"optim.lr: 0.002 -> 0.0001\nresume=adjust continues"):
        run(override(copied, "optim.lr=1e-4"))
    assert sorted(Path(copied.output.folder).rglob("*")) == before


def test_adjusted_settings_are_recorded_and_hold_from_here_on(copied, monkeypatch):
    """Compared with the straight run: the samples are the same, the schedules are those of the new settings."""
    folder = Path(copied.output.folder)
    saved = newest(copied)
    keys, used = record_steps(monkeypatch)
    run(override(copied, f"output.folder={folder.with_name('straight')}"))
    straight, keys[:], used[:] = keys[STOP:], [], []

    settings = [f"{name}={value}" for name, value in ADJUSTMENTS.items()]
    config = override(copied, *settings, "resume=adjust", "output.checkpoint_every=4")
    state = run(config)
    assert (state.step, state.applied_steps) == (15, 15), "five epochs of three steps"
    assert keys[: len(straight)] == straight
    assert {id(schedules) for schedules, _ in used} == {id(used[0][0])}
    schedules = used[0][0]
    assert isinstance(schedules, Schedules) and schedules.config == config.optim
    # The position in the new schedules is the number of applied steps of the whole run.
    assert [applied for _, applied in used] == list(range(STOP, 15))
    row = read_metrics(folder)[-1]
    assert row["optim/lr"] == schedules.lr(14) and row["optim/weight_decay"] == schedules.weight_decay(14)

    first, last = read_starts(folder)
    assert first["changes"] == [] and [change["setting"] for change in last["changes"]] == sorted(ADJUSTMENTS)
    changes = {change.pop("setting"): change for change in last["changes"]}
    assert changes["optim.lr"] == {"step": STOP, "from": 2e-3, "to": 1e-4}
    assert changes["optim.clip_norm"] == {"step": STOP, "from": 1.0, "to": None}
    assert newest(config).counters["changes"] == read_starts(folder)[-1]["changes"]
    page = write_run_report(folder).read_text()
    assert "Settings changed on resuming" in page and "optim.teacher_momentum" in page

    # The next start is a plain one.
    assert newest(config).fingerprint != saved.fingerprint
    shutil.rmtree(checkpoints.find_newest_folder(folder))
    assert run(replace(config, resume="auto")).step == 15
    assert newest(config).counters["changes"] == read_starts(folder)[1]["changes"]
    assert read_starts(folder)[-1]["changes"] == []


def record_steps(monkeypatch) -> tuple[list, list]:
    """Return lists that receive the sample keys, and the schedules with the position in them, of each later step."""
    keys, used = [], []
    train_step = pretraining.train_step

    def record(*arguments, applied_steps, **options):
        report = train_step(*arguments, applied_steps=applied_steps, **options)
        keys.append(report.keys)
        used.append((arguments[4], applied_steps))
        return report

    monkeypatch.setattr(pretraining, "train_step", record)
    return keys, used


def test_without_a_change_adjust_resumes_bit_equal(copied):
    run(override(copied, "resume=adjust"))
    adjusted = newest(copied)
    shutil.rmtree(adjusted.folder)
    run(copied)
    assert all(torch.equal(value, adjusted.engine_state[name]) for name, value in newest(copied).engine_state.items())
    assert adjusted.counters["changes"] == []


def test_adjust_starts_a_run_in_a_new_folder(copied, tmp_path):
    assert run(override(copied, "resume=adjust", f"output.folder={tmp_path / 'new'}", "optim.epochs=2")).step == 6


def test_the_remedy_for_skipped_steps_works_as_written(tiny_shards, tmp_path):
    """The learning rate lets the run diverge in its second step, after a checkpoint of the first."""
    config = tiny_run(tiny_shards, tmp_path / "run", max_skipped_steps=4)
    config = override(config, "optim.lr=1e30", "output.log_every=2", "output.checkpoint_every=1")
    with pytest.raises(FloatingPointError) as caught:
        run(config)
    remedy = re.search(r"resume=adjust optim\.lr=[^, ]+", str(caught.value))
    assert remedy, caught.value
    config = override(config, *remedy.group().split())
    assert run(config).step == 12
    assert newest(config).applied_steps == 12
    assert run(replace(config, resume="auto")).step == 12
