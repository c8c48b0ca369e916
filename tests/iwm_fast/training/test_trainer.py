"""The line as a whole, in one process: from tiny shards to weights."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file

from fixtures.paths import PROJECT
from fixtures.tar_files import encode, photograph
from fixtures.tiny_pretraining import STEPS, losses, tiny_run
from iwm_fast import world_model
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.checkpoints.export import export
from iwm_fast.config.commands import ExportConfig
from iwm_fast.config.run import RunConfig, accumulation_steps
from iwm_fast.monitoring.metrics import MetricWriter, read_metrics
from iwm_fast.pipelines.config import DataConfig
from iwm_fast.runtime import distributed
from iwm_fast.train import run
from iwm_fast.training.components import build_components
from iwm_fast.training.loaders import training_loader
from iwm_fast.training.pretraining import PretrainTask
from iwm_fast.training.schedules import build_schedules
from iwm_fast.training.step import train_step
from iwm_fast.training.trainer import Trainer


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


def final_state(config: RunConfig) -> dict[str, torch.Tensor]:
    saved = checkpoints.read(checkpoints.newest(Path(config.output.folder)))
    return saved.engine_state | {f"teacher/{name}": value for name, value in saved.teacher_state.items()}


def assert_bit_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_golden_step(rank_info, tiny_shards, tmp_path):
    """Change these numbers only with a change that is meant to change what is trained, and say so in the commit."""
    loss, norm = losses(rank_info, tiny_run(tiny_shards, tmp_path, loader="torch"))
    torch.testing.assert_close(torch.tensor(loss), torch.tensor(GOLDEN_LOSS), rtol=2e-4, atol=0)
    torch.testing.assert_close(torch.tensor(norm), torch.tensor(GOLDEN_NORM), rtol=2e-3, atol=0)


GOLDEN_LOSS = [1.1689076, 1.1780695, 1.1079285]
GOLDEN_NORM = [1.539488, 1.594683, 1.455176]


def test_micro_batches_give_the_same_loss_within_rounding(rank_info, tiny_shards, tmp_path):
    whole = losses(rank_info, tiny_run(tiny_shards, tmp_path))
    parts = losses(rank_info, tiny_run(tiny_shards, tmp_path, micro_batch_size=4))
    torch.testing.assert_close(torch.tensor(parts), torch.tensor(whole), rtol=1e-4, atol=1e-6)


def test_the_loaders_give_losses_within_a_percent(rank_info, tiny_shards, tmp_path):
    fast = losses(rank_info, tiny_run(tiny_shards, tmp_path, loader="dali"))[0]
    plain = losses(rank_info, tiny_run(tiny_shards, tmp_path, loader="torch"))[0]
    torch.testing.assert_close(torch.tensor(fast), torch.tensor(plain), rtol=1e-2, atol=0)
    assert fast != plain  # decoders differ: equal losses would mean that one loader ran twice


@pytest.mark.parametrize("stage", [1, 2])
def test_the_engines_give_the_same_losses(rank_info, tiny_shards, tmp_path, stage):
    plain = losses(rank_info, tiny_run(tiny_shards, tmp_path))
    zero = losses(rank_info, tiny_run(tiny_shards, tmp_path, engine="deepspeed", zero_stage=stage))
    torch.testing.assert_close(torch.tensor(zero), torch.tensor(plain), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("engine", "runtime"),
    [("plain", {"micro_batch_size": 8}), ("deepspeed", {"zero_stage": 1}), ("deepspeed", {"zero_stage": 2})],
)
def test_a_stopped_and_resumed_run_equals_a_straight_one_bit_for_bit(tiny_shards, tmp_path, engine, runtime):
    straight = tiny_run(tiny_shards, tmp_path / "straight", engine=engine, **runtime)
    run(straight)
    stopped = tiny_run(tiny_shards, tmp_path / "stopped", engine=engine, **runtime)
    stopped = replace(stopped, resume="auto")
    crash_after(stopped, step=7)  # the newest checkpoint is that of step 5, in the middle of the second epoch
    assert checkpoints.newest(tmp_path / "stopped").name == "step-00000005"
    assert run(stopped).step == STEPS
    assert_bit_equal(final_state(stopped), final_state(straight))
    rows = [read_metrics(Path(config.output.folder)) for config in (straight, stopped)]
    assert [row["step"] for row in rows[1]] == [row["step"] for row in rows[0]]
    # the window of step 8 began at step 5 in one run and behind the checkpoint in the other
    assert rows[1][-1]["loss/prediction"] == rows[0][-1]["loss/prediction"]


def crash_after(config: RunConfig, step: int) -> None:
    """Train until an error in the given step, as a power failure would end it."""

    class PowerError(Exception):
        pass

    here = distributed.start("cpu")
    try:
        trainer = build_components(config, here)
        forward = trainer.engine.forward
        _, accumulation = accumulation_steps(config, here.world_size)
        calls = iter(range(step * accumulation))

        def fail(batch):
            if next(calls, None) is None:
                raise PowerError
            return forward(batch)

        trainer.engine.forward = fail
        with pytest.raises(PowerError):
            Trainer(PretrainTask(trainer)).run()
    finally:
        distributed.stop()


def test_a_finished_run_is_left_as_it_is(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run")
    run(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    run(replace(config, resume="auto"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_folder_with_a_run_is_not_overwritten(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run")
    run(config)
    with pytest.raises(ValueError, match=r"already holds a run; name another folder, or say resume=auto"):
        run(config)


def test_a_run_goes_on_only_with_its_own_settings(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run")
    run(config)
    other = replace(config, seed=1, resume="auto")
    other = replace(other, optim=replace(other.optim, lr=1e-3))
    with pytest.raises(CheckpointError, match=r"(?s)optim.lr: 0.002 -> 0.001.*seed: 0 -> 1") as caught:
        run(other)
    assert "output.folder" in str(caught.value)


def test_the_run_folder_says_what_was_run(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run")
    run(config)
    started = json.loads((tmp_path / "run" / "started.jsonl").read_text())
    assert {"command", "commit", "versions", "machine", "world_size"} <= started.keys()
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [4, 8, 12]
    for name in ("loss/prediction", "monitor/target_std", "monitor/rank_me", "speed/images_per_s", "data/wait_share"):
        assert all(row[name] >= 0 for row in rows), name
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    loaded = world_model.load(tmp_path / "run")
    assert loaded.config == config and loaded.step == STEPS


def test_the_teacher_is_what_is_loaded_and_it_lags_behind_the_encoder(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run")
    run(config)
    state = final_state(config)
    loaded = world_model.load(tmp_path / "run")
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(loaded.encoder.state_dict()[name], state[f"teacher/{name}"])
    untrained = world_model.untrained(config).encoder.state_dict()[name]
    moved = (state[f"weight/encoder.{name}"] - untrained).norm()
    assert 0 < (state[f"teacher/{name}"] - untrained).norm() < 0.2 * moved


def test_the_example_of_the_readme_works_and_the_runs_export_is_timms(tiny_shards, tmp_path, monkeypatch):
    run(tiny_run(tiny_shards, tmp_path / "run"))
    readme = (PROJECT / "README.md").read_text()
    example = re.search(r"```python\n(.*?)```", readme, re.DOTALL).group(1)
    assert len([line for line in example.splitlines() if line]) == 5
    monkeypatch.chdir(tmp_path)
    Path("photo.jpg").write_bytes(encode(photograph("coffee.png")))
    names: dict[str, Any] = {}
    exec(example.replace("runs/demo", "run"), names)
    assert names["imagined"].shape == (1, 16, 32)
    folder = export(ExportConfig(run="run", to="export"))
    described = json.loads((folder / "config.json").read_text())
    encoder = eval(described["encoder"]["call"], {"timm": timm})
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"), strict=True)
    features = encoder.eval()(names["image"])
    torch.testing.assert_close(features, names["model"].encode(names["image"]).mean(dim=1), atol=1e-5, rtol=1e-4)


def test_the_identity_predictor_trains_with_its_own_terms(rank_info, tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path, depth=0)
    trainer = build_components(config, rank_info)
    assert trainer.objective.variance_weight > 0
    loss, _ = losses(rank_info, config, steps=6)
    assert loss[-1] < loss[0]


def test_training_lowers_the_loss(rank_info, tiny_shards, tmp_path):
    loss, _ = losses(rank_info, tiny_run(tiny_shards, tmp_path), steps=12)
    assert loss[-1] < 0.8 * loss[0]


def test_a_step_that_is_not_finite_changes_neither_weights_nor_teacher(rank_info, tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path)
    trainer = build_components(config, rank_info)
    loader = training_loader(config, trainer.shards, rank_info)

    def step(batches):
        return train_step(
            trainer.engine,
            trainer.teacher,
            trainer.objective,
            batches,
            build_schedules(config.optim, trainer.shards.num_samples),
            applied_steps=0,
            accumulation=1,
        )

    # after one good step the encoder is ahead of the teacher, so that a forbidden update would show
    assert step(loader).is_applied
    batch = next(loader)
    loader.close()
    before = {name: value.clone() for name, value in trainer.engine.state().items()}
    teacher = {name: value.clone() for name, value in trainer.teacher.state_dict().items()}
    poisoned = iter([replace(batch, source_view=batch.source_view * float("nan"))])
    assert not step(poisoned).is_applied
    assert_bit_equal(trainer.engine.state(), before)
    assert_bit_equal(trainer.teacher.state_dict(), teacher)


def test_metrics_beyond_the_checkpoint_are_dropped(tmp_path):
    writer = MetricWriter(tmp_path, first_step=0)
    for step in (5, 10, 15):
        writer.write(step, {"loss/prediction": float(step), "optim/grad_norm": math.inf})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "loss/pred')  # cut off by a crash
    MetricWriter(tmp_path, first_step=10).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [5, 10]
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("train_shards", ["", "absent-{000..003}.tar"])
def test_missing_shards_end_before_anything_is_written(tiny_shards, tmp_path, train_shards):
    config = tiny_run(tiny_shards, tmp_path / "run")
    config = replace(config, data=DataConfig(train=train_shards and str(tmp_path / train_shards)))
    with pytest.raises((ValueError, FileNotFoundError)):
        run(config)
    assert not (tmp_path / "run").exists()
