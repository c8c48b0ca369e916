"""Complete training runs in one process, from tiny shards to weights."""

import json
import math
import re
import socket
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from fixtures.metric_rows import repeatable_rows
from fixtures.paths import PROJECT
from fixtures.tar_files import encode, photograph
from fixtures.tiny_pretraining import STEPS, losses, tiny_run
from iwm_fast import world_model
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.async_writer import CheckpointWriter
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.checkpoints.export import export
from iwm_fast.config.batch_size import accumulation_steps
from iwm_fast.config.commands import ExportConfig
from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.metric_writer import MetricWriter
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines.config import DataConfig
from iwm_fast.runtime import distributed
from iwm_fast.runtime.error_reporting import user_facing_errors
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.runtime.run_lock import RunLock
from iwm_fast.runtime.run_status import read_status, write_status
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
    saved = checkpoints.read(checkpoints.find_newest_folder(Path(config.output.folder)))
    return saved.engine_state | {f"teacher/{name}": value for name, value in saved.teacher_state.items()}


def assert_bit_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_the_first_steps_have_recorded_losses(rank_info, tiny_shards, tmp_path):
    """Update these numbers only with a change that is meant to change the training, and mention it in the commit."""
    loss, norm = losses(rank_info, tiny_run(tiny_shards, tmp_path, loader="torch"))
    torch.testing.assert_close(torch.tensor(loss), torch.tensor(GOLDEN_LOSS), rtol=2e-4, atol=0)
    torch.testing.assert_close(torch.tensor(norm), torch.tensor(GOLDEN_NORM), rtol=2e-3, atol=0)


GOLDEN_LOSS = [1.169578, 1.1759123, 1.1088318]
GOLDEN_NORM = [1.541717, 1.598366, 1.453231]


def test_micro_batches_give_the_same_loss_within_rounding(rank_info, tiny_shards, tmp_path):
    full = losses(rank_info, tiny_run(tiny_shards, tmp_path))
    accumulated = losses(rank_info, tiny_run(tiny_shards, tmp_path, micro_batch_size=4))
    torch.testing.assert_close(torch.tensor(accumulated), torch.tensor(full), rtol=1e-4, atol=1e-6)


def test_the_loaders_give_losses_within_one_percent(rank_info, tiny_shards, tmp_path):
    fast = losses(rank_info, tiny_run(tiny_shards, tmp_path, loader="dali"))[0]
    plain = losses(rank_info, tiny_run(tiny_shards, tmp_path, loader="torch"))[0]
    torch.testing.assert_close(torch.tensor(fast), torch.tensor(plain), rtol=1e-2, atol=0)
    # The decoders differ, so equal losses would mean that one loader ran twice.
    assert fast != plain


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
    # The newest checkpoint is that of step 5, in the middle of the second epoch.
    crash_after(stopped, step=7)
    assert checkpoints.find_newest_folder(tmp_path / "stopped").name == "step-00000005"
    assert run(stopped).step == STEPS
    assert_bit_equal(final_state(stopped), final_state(straight))
    assert repeatable_rows(tmp_path / "stopped") == repeatable_rows(tmp_path / "straight")


def crash_after(config: RunConfig, step: int) -> None:
    """Train until an error after `step` steps, which stands for a power failure."""

    class PowerError(Exception):
        pass

    rank_info = distributed.start("cpu")
    try:
        components = build_components(config, rank_info)
        forward = components.engine.forward
        _, accumulation = accumulation_steps(config, rank_info.world_size)
        calls = iter(range(step * accumulation))

        def fail(batch):
            if next(calls, None) is None:
                raise PowerError
            return forward(batch)

        components.engine.forward = fail
        with pytest.raises(PowerError):
            Trainer(PretrainTask(components)).run()
    finally:
        distributed.stop()


def test_only_the_last_checkpoint_may_take_longer_than_the_grace_period(tiny_shards, tmp_path, monkeypatch):
    preemption, wait, is_suspended = Preemption(), CheckpointWriter.wait, []

    def recorded_wait(writer):
        is_suspended.append(preemption.is_deadline_suspended)
        wait(writer)

    monkeypatch.setattr(CheckpointWriter, "wait", recorded_wait)
    run(tiny_run(tiny_shards, tmp_path / "run"), preemption)
    assert is_suspended[-1] and not any(is_suspended[:-1])


def test_a_finished_run_is_left_unchanged(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run")
    run(config)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    run(replace(config, resume="auto"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_a_folder_with_a_run_is_not_overwritten(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run")
    run(config)
    with pytest.raises(ValueError, match=r"already holds a run; set resume=auto to resume it, or name another"):
        run(config)


def test_the_tokens_of_a_step_are_freed_before_the_next_one(tiny_shards, tmp_path):
    rank_info = distributed.start("cpu")
    try:
        config = tiny_run(tiny_shards, tmp_path / "run", loader="torch")
        task = PretrainTask(build_components(config, rank_info))
        make_step, reports = task.step, []

        def step(*arguments):
            assert not [report for report in reports if report() is not None]
            report = make_step(*arguments)
            reports.append(weakref.ref(report))
            return report

        task.step = step
        Trainer(task).run()
        assert len(reports) == STEPS
    finally:
        distributed.stop()


def test_a_run_resumes_only_with_the_same_settings(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run")
    run(config)
    other = replace(config, seed=1, resume="auto")
    other = replace(other, optim=replace(other.optim, lr=1e-3))
    with pytest.raises(CheckpointError, match=r"(?s)optim.lr: 0.002 -> 0.001.*seed: 0 -> 1") as caught:
        run(other)
    assert "output.folder" in str(caught.value)


def test_the_run_folder_describes_the_run(tiny_shards, tmp_path):
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


def test_the_teacher_is_loaded_and_has_moved_less_than_the_encoder(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run")
    run(config)
    state = final_state(config)
    loaded = world_model.load(tmp_path / "run")
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(loaded.encoder.state_dict()[name], state[f"teacher/{name}"])
    untrained = world_model.build_untrained(config).encoder.state_dict()[name]
    moved = (state[f"weight/encoder.{name}"] - untrained).norm()
    assert 0 < (state[f"teacher/{name}"] - untrained).norm() < 0.2 * moved


def test_the_readme_example_works_and_an_export_loads_into_timm(tiny_shards, tmp_path, monkeypatch):
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
    encoder = timm.create_model(f"local-dir:{folder}", pretrained=True)
    features = encoder.eval()(names["image"])
    torch.testing.assert_close(features, names["model"].encode(names["image"]).mean(dim=1), atol=1e-5, rtol=1e-4)


def test_the_identity_predictor_trains_with_its_own_terms(rank_info, tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path, depth=0)
    components = build_components(config, rank_info)
    assert components.objective.variance_weight > 0
    loss, _ = losses(rank_info, config, steps=6)
    assert loss[-1] < loss[0]


def test_the_identity_predictor_resumes_with_the_same_images_per_forward_only(tiny_shards, tmp_path):
    config = replace(tiny_run(tiny_shards, tmp_path / "run", depth=0, micro_batch_size=8), resume="auto")
    crash_after(config, step=7)
    for size in (4, 16):
        other = replace(config, runtime=replace(config.runtime, micro_batch_size=size))
        with pytest.raises(CheckpointError, match=rf"ranks \* runtime.micro_batch_size: 8 -> {size}\nset them back"):
            run(other)
    assert run(config).step == STEPS


def test_training_lowers_the_loss(rank_info, tiny_shards, tmp_path):
    loss, _ = losses(rank_info, tiny_run(tiny_shards, tmp_path), steps=12)
    assert loss[-1] < 0.8 * loss[0]


def test_a_nonfinite_step_changes_neither_weights_nor_teacher(rank_info, tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path)
    components = build_components(config, rank_info)
    loader = training_loader(config, components.shards, rank_info)

    def step(batches):
        return train_step(
            components.engine,
            components.teacher,
            components.objective,
            batches,
            build_schedules(config.optim, components.shards.num_samples),
            applied_steps=0,
            accumulation=1,
        )

    # After a finite step, encoder and teacher differ, so that an unwanted update would be visible.
    assert step(loader).is_applied
    batch = next(loader)
    loader.close()
    before = {name: value.clone() for name, value in components.engine.state().items()}
    teacher = {name: value.clone() for name, value in components.teacher.state_dict().items()}
    nonfinite = iter([replace(batch, source_view=batch.source_view * float("nan"))])
    assert not step(nonfinite).is_applied
    assert_bit_equal(components.engine.state(), before)
    assert_bit_equal(components.teacher.state_dict(), teacher)


def test_metrics_beyond_the_checkpoint_are_dropped(tmp_path):
    writer = MetricWriter(tmp_path, first_step=0)
    for step in (5, 10, 15):
        writer.write(step, {"loss/prediction": float(step), "optim/grad_norm": math.inf})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        # A line that a crash cut short.
        file.write('{"step": 20, "loss/pred')
    MetricWriter(tmp_path, first_step=10).close()
    assert [row["step"] for row in read_metrics(tmp_path)] == [5, 10]
    assert "Infinity" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("train_shards", ["", "absent-{000..003}.tar"])
def test_missing_shards_end_the_run_before_anything_is_written(tiny_shards, tmp_path, train_shards):
    config = tiny_run(tiny_shards, tmp_path / "run")
    config = replace(config, data=DataConfig(train=train_shards and str(tmp_path / train_shards)))
    with pytest.raises((ValueError, FileNotFoundError)):
        run(config)
    assert not (tmp_path / "run").exists()


@pytest.fixture
def used_port(monkeypatch):
    """Pretend to be rank 0 of two ranks whose port another process listens on; return the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = str(listener.getsockname()[1])
        environment = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
        for name, value in (environment | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        yield port


def test_a_port_in_use_is_one_message_and_the_status_failed(tiny_shards, tmp_path, used_port, capfd):
    with pytest.raises(SystemExit) as end, user_facing_errors():
        run(tiny_run(tiny_shards, tmp_path / "run"))
    message = capfd.readouterr().err
    assert end.value.code == 2 and message.count("error (rank 0): ") == 1 and "Traceback" not in message, message
    assert f"port {used_port} is in use by another process" in message and "--master-port" in message
    # The launcher then ends the other ranks, which must not hide the failure.
    write_status(tmp_path / "run", "preempted", reason="SIGTERM", earlier={})
    status = read_status(tmp_path / "run")
    assert status["state"] == "failed" and f"port {used_port} is in use" in status["reason"]


def test_a_port_that_another_run_in_this_folder_uses_leaves_its_status(tiny_shards, tmp_path, used_port):
    lock = RunLock(tmp_path / "run")
    write_status(tmp_path / "run", "running", step=7)
    with pytest.raises(distributed.ProcessGroupError, match=f"port {used_port} is in use"):
        run(tiny_run(tiny_shards, tmp_path / "run"))
    lock.close()
    assert read_status(tmp_path / "run")["state"] == "running" and read_status(tmp_path / "run")["step"] == 7
