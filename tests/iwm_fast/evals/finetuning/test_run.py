"""Training of a job: resuming, refusing other settings, and equal results of all engines."""

import math
import os
import random
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from fixtures.launchers import CHILD_ENVIRONMENT, free_port
from fixtures.paths import PYTHONPATH, WORKERS
from fixtures.tiny_finetuning import STEPS, Toy, plain_augment, tiny_task, toy_context, toy_job, train_toy, weights_of
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.config.run import RuntimeConfig
from iwm_fast.evals.finetuning.run import (
    build_run_config,
    map_validation_images,
    split_global_batch,
    task_folder,
    train_job,
)
from iwm_fast.evals.finetuning.task import LABELS_ENTRY, MAPS_ENTRY, AutocastModule, to_float32
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.runtime import distributed
from iwm_fast.runtime.preemption import PreemptedError, Preemption
from iwm_fast.runtime.run_lock import RunLock
from iwm_fast.runtime.run_status import read_status
from iwm_fast.runtime.seeding import seeded_rng


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


class StopAt:
    """Requests a stop through its preemption when it sees the batch of a step."""

    def __init__(self, step):
        self.step = step
        self.preemption = Preemption()

    def __call__(self, batch):
        if batch.step == self.step:
            self.preemption.reason = "SIGTERM"


def assert_same(first, second):
    assert first.keys() == second.keys()
    assert not [name for name in first if not torch.equal(first[name], second[name])]


def stop_and_resume(rank_info, shards, folder, task, watch):
    with pytest.raises(PreemptedError):
        train_toy(rank_info, shards, folder, task, watch=watch, preemption=watch.preemption)
    # In another process, the global generators would have other states.
    torch.manual_seed(123)
    np.random.seed(123)
    return train_toy(rank_info, shards, folder, task)


@pytest.mark.parametrize("runtime", [{}, {"micro_batch_size": 4}, {"loader": "dali", "loader_threads": 1}])
def test_a_resumed_job_is_bit_equal_to_an_uninterrupted_one(rank_info, tiny_shards, tmp_path, runtime):
    task = tiny_task(tiny_shards, runtime=runtime)
    uninterrupted, _ = train_toy(rank_info, tiny_shards, tmp_path / "uninterrupted", task)
    resumed, stats = stop_and_resume(rank_info, tiny_shards, tmp_path / "resumed", task, StopAt(5))
    assert_same(weights_of(resumed), weights_of(uninterrupted))
    first, second = (read_metrics(tmp_path / name / "toy") for name in ("uninterrupted", "resumed"))
    assert [row["loss/train"] for row in first] == [row["loss/train"] for row in second]
    assert stats.steps == STEPS and [row["step"] for row in first] == [3, 6, 9]


@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_a_job_under_zero_resumes_bit_equal(rank_info, tiny_shards, tmp_path, stage):
    task = tiny_task(tiny_shards, engine="deepspeed", runtime={"zero_stage": stage})
    uninterrupted, _ = train_toy(rank_info, tiny_shards, tmp_path / "uninterrupted", task)
    resumed, _ = stop_and_resume(rank_info, tiny_shards, tmp_path / "resumed", task, StopAt(5))
    assert_same(weights_of(resumed), weights_of(uninterrupted))


def test_a_stopped_job_writes_a_checkpoint_and_its_status(rank_info, tiny_shards, tmp_path):
    watch = StopAt(5)
    with pytest.raises(PreemptedError):
        train_toy(rank_info, tiny_shards, tmp_path, watch=watch, preemption=watch.preemption)
    saved = [path.name for path in checkpoints.list_checkpoint_folders(tmp_path / "toy")]
    assert saved == ["step-00000004", "step-00000006"]
    status = read_status(tmp_path / "toy")
    assert status["state"] == "preempted" and status["reason"] == "SIGTERM" and status["step"] == 6


def test_the_deadline_of_a_stop_does_not_interrupt_its_checkpoint(rank_info, tiny_shards, tmp_path):
    watch = StopAt(5)
    with pytest.raises(PreemptedError):
        train_toy(rank_info, tiny_shards, tmp_path, watch=watch, preemption=watch.preemption)
    assert watch.preemption.is_deadline_suspended


@pytest.mark.multi_rank
def test_the_status_names_the_failure_of_any_rank(tiny_shards, tmp_path):
    port, ranks = free_port(), []
    for rank in "01":
        environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": PYTHONPATH}
        command = [sys.executable, str(WORKERS / "ranks_finetune.py"), tiny_shards.pattern, str(tmp_path)]
        ranks.append(subprocess.Popen(command, env=os.environ | CHILD_ENVIRONMENT | environment))
    assert [rank.wait(timeout=120) for rank in ranks] == [1, 2]
    status = read_status(tmp_path / "toy")
    assert status["state"] == "failed" and "rank 1 cannot continue" in status["reason"], status


@pytest.mark.parametrize("stage", [None, 0, 1, 2, 3])
def test_engines_give_the_same_weights_and_release_a_usable_module(rank_info, tiny_shards, tmp_path, stage):
    plain, _ = train_toy(rank_info, tiny_shards, tmp_path / "plain")
    untrained = weights_of(toy_job(tiny_task(tiny_shards), tiny_run(tiny_shards, tmp_path)).module)
    # Below the threshold, stage 3 does not shard parameters.
    sharded = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}} if stage == 3 else {}
    engine = {"engine": "deepspeed", "runtime": {"zero_stage": stage, **sharded}} if stage is not None else {}
    other, stats = train_toy(rank_info, tiny_shards, tmp_path / "other", tiny_task(tiny_shards, **engine))
    assert stats.num_tuned == sum(weight.numel() for weight in untrained.values()) == 48 * 12 + 12 + 24 + 36 + 3
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(weights_of(other)[name], weight, rtol=1e-4, atol=1e-6)
        assert not torch.equal(weight, untrained[name]), name
    # The engine is released, so the module runs on any number of images and computes its own gradients.
    assert not other.training
    scores = other({"pixels": torch.zeros(5, 48)})
    scores.sum().backward()
    assert scores.shape == (5, 3) and all(parameter.grad is not None for parameter in other.parameters())


def test_parameter_groups_have_their_own_learning_rates(rank_info, tiny_shards, tmp_path):
    # Adam's first step equals the learning rate for any gradient.
    task = tiny_task(tiny_shards, tune={"epochs": 1 / 6, "warmup_epochs": 0.0, "weight_decay": 0.0, "clip_norm": None})
    module, stats = train_toy(rank_info, tiny_shards, tmp_path, task)
    assert stats.steps == 1 and stats.images_per_s is None
    before = weights_of(toy_job(task, tiny_run(tiny_shards, tmp_path)).module)
    for name, scale in {"embed.weight": 0.25, "norm.bias": 0.5, "head.weight": 1.0}.items():
        change = (weights_of(module)[name] - before[name]).abs().median()
        assert change.item() == pytest.approx(1e-2 * scale, rel=0.01), name


def test_micro_batches_give_the_same_weights_within_rounding(rank_info, tiny_shards, tmp_path):
    deterministic = {"dropout": 0.0, "noise": 0.0}
    first, _ = train_toy(rank_info, tiny_shards, tmp_path / "full", tiny_task(tiny_shards), **deterministic)
    split = tiny_task(tiny_shards, runtime={"micro_batch_size": 2})
    second, _ = train_toy(rank_info, tiny_shards, tmp_path / "split", split, **deterministic)
    for name, weight in weights_of(first).items():
        torch.testing.assert_close(weights_of(second)[name], weight, rtol=1e-4, atol=1e-6)


def test_a_finished_job_is_read_and_not_trained_again(rank_info, tiny_shards, tmp_path):
    trained, first = train_toy(rank_info, tiny_shards, tmp_path)

    def fail(batch):
        raise AssertionError("a finished job must not load batches")

    read, second = train_toy(rank_info, tiny_shards, tmp_path, watch=fail)
    assert_same(weights_of(read), weights_of(trained))
    assert second == first and first.steps == STEPS and first.images_per_s > 0 and not read.training
    assert read_status(tmp_path / "toy")["state"] == "finished"


CHANGES = {
    "tune.lr": lambda task: replace(task, tune=replace(task.tune, lr=0.5)),
    "augment.crop_scale": lambda task: replace(task, augment=plain_augment(crop_scale=(0.2, 1.0))),
    "data.label": lambda task: replace(task, data=replace(task.data, label="json.size")),
    "seed": lambda task: replace(task, seed=5),
}


@pytest.mark.parametrize("name", CHANGES)
def test_other_settings_are_refused_with_their_names_and_remedies(rank_info, tiny_shards, tmp_path, name):
    task = tiny_task(tiny_shards)
    train_toy(rank_info, tiny_shards, tmp_path, task)
    with pytest.raises(
        CheckpointError, match=rf"(?s)toy was trained with other settings.*{name}: .*name=OTHER.*delete"
    ):
        train_toy(rank_info, tiny_shards, tmp_path, CHANGES[name](task))


def test_settings_that_do_not_affect_the_result_may_change(rank_info, tiny_shards, tmp_path):
    task = tiny_task(tiny_shards)
    _, first = train_toy(rank_info, tiny_shards, tmp_path, task)
    other = replace(task, name="two", log_every=1, runtime=RuntimeConfig(device="cpu", micro_batch_size=4))
    assert train_toy(rank_info, tiny_shards, tmp_path, other)[1] == first


def test_another_origin_is_refused(rank_info, tiny_shards, tmp_path):
    train_toy(rank_info, tiny_shards, tmp_path)
    task, config = tiny_task(tiny_shards), tiny_run(tiny_shards, tmp_path)
    job = replace(toy_job(task, config), origin={"run.step": 7})
    with pytest.raises(CheckpointError, match=r"run\.step: None -> 7"):
        train_job(job, toy_context(rank_info, tiny_shards, tmp_path, task))


@pytest.mark.parametrize("entry", [LABELS_ENTRY, MAPS_ENTRY])
def test_other_labels_or_maps_are_refused_unless_an_earlier_version_trained_the_job(
    rank_info, tiny_shards, tmp_path, entry
):
    task, config = tiny_task(tiny_shards), tiny_run(tiny_shards, tmp_path)

    def train(name, digest):
        job = toy_job(task, config, name=name)
        return train_job(replace(job, origin={entry: digest} if digest else {}), toy_context(
            rank_info, tiny_shards, tmp_path, task))  # fmt: skip

    assert train("earlier", "") == train("earlier", "new")
    train("later", "old")
    with pytest.raises(CheckpointError, match=f"{entry}: old -> new"):
        train("later", "new")


def test_training_resumes_from_the_checkpoint_before_a_damaged_one(rank_info, tiny_shards, tmp_path):
    undamaged, _ = train_toy(rank_info, tiny_shards, tmp_path)
    newest = checkpoints.find_newest_folder(tmp_path / "toy")
    (newest / checkpoints.MODEL).write_bytes(b"nothing")
    resumed, _ = train_toy(rank_info, tiny_shards, tmp_path)
    assert_same(weights_of(resumed), weights_of(undamaged))
    assert newest.with_name(f"{newest.name}.refused").exists()


def test_a_step_with_a_bad_batch_is_skipped(rank_info, tiny_shards, tmp_path, caplog):
    steps = []

    def spoil(batch):
        steps.append(batch.step)
        if batch.step == 2:
            batch.source_view.fill_(math.nan)

    module, stats = train_toy(rank_info, tiny_shards, tmp_path, watch=spoil)
    assert "step 3 skipped" in caplog.text and "0: 00" in caplog.text
    assert all(weight.isfinite().all() for weight in weights_of(module).values())
    assert stats.steps == STEPS and len(steps) == STEPS
    assert read_metrics(tmp_path / "toy")[0]["optim/skipped_steps"] == 1
    assert checkpoints.read(checkpoints.find_newest_folder(tmp_path / "toy")).applied_steps == STEPS - 1


def test_too_many_bad_batches_end_training_with_a_checkpoint(rank_info, tiny_shards, tmp_path):
    task = tiny_task(tiny_shards, runtime={"max_skipped_steps": 2})
    with pytest.raises(FloatingPointError, match=r"2 steps in a row.*last one step 3.*lower tune\.lr"):
        train_toy(
            rank_info, tiny_shards, tmp_path, task,
            watch=lambda batch: batch.source_view.fill_(math.nan) if batch.step else None,
        )  # fmt: skip
    assert checkpoints.find_newest_folder(tmp_path / "toy").name == "step-00000003"
    assert read_status(tmp_path / "toy")["state"] == "failed"


@pytest.mark.parametrize("place", ["outputs", "gradient"])
def test_a_step_with_bad_outputs_or_gradients_is_skipped(rank_info, tiny_shards, tmp_path, place, monkeypatch):
    forward, calls = Toy.forward, []

    def spoil(module, inputs):
        calls.append(forward(module, inputs))
        if len(calls) == 3:
            if place == "outputs":
                return calls[-1] * math.inf
            calls[-1].register_hook(lambda gradient: gradient * math.nan)
        return calls[-1]

    monkeypatch.setattr(Toy, "forward", spoil)
    module, _ = train_toy(rank_info, tiny_shards, tmp_path)
    assert all(weight.isfinite().all() for weight in weights_of(module).values())
    # The third step is logged.
    first, *_ = read_metrics(tmp_path / "toy")
    assert first["step"] == 3 and first["optim/skipped_steps"] == 1 and first["loss/train"] > 0


def test_a_job_that_diverges_saves_nothing_and_trains_again_as_the_message_says(rank_info, tiny_shards, tmp_path):
    task = tiny_task(tiny_shards, tune={"lr": 1e30}, runtime={"max_skipped_steps": 3}, checkpoint_every=1)
    with pytest.raises(FloatingPointError, match=r"lower tune\.lr together with name=OTHER"):
        train_toy(rank_info, tiny_shards, tmp_path / "finetune", task)
    names = [path.name for path in checkpoints.list_checkpoint_folders(tmp_path / "finetune" / "toy")]
    assert names == ["step-00000001"]
    _, stats = train_toy(rank_info, tiny_shards, tmp_path / "finetune_other")
    assert stats.steps == STEPS


def test_a_folder_in_use_is_refused(rank_info, tiny_shards, tmp_path):
    lock = RunLock(tmp_path / "toy")
    with pytest.raises(ValueError, match="in use by another run"):
        train_toy(rank_info, tiny_shards, tmp_path)
    lock.close()


def draw():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), [random.random() for _ in range(3)]


def test_seeded_draws_depend_on_counters_and_leave_no_trace():
    cpu = torch.device("cpu")

    def drawn(*counters, seed=0):
        with seeded_rng(*counters, seed=seed, device=cpu):
            return draw()

    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    undisturbed = draw()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = drawn(3, 0, 1)
    assert draw() == undisturbed
    assert drawn(3, 0, 1) == first
    for other in (drawn(4, 0, 1), drawn(3, 1, 1), drawn(3, 0, 0), drawn(3, 0, 1, seed=1)):
        assert all(one != another for one, another in zip(first, other, strict=True))


def test_a_module_computes_in_bf16_and_returns_float32(rank_info, tiny_shards, tmp_path):
    dtypes = []

    class Recorder(torch.nn.Linear):
        def forward(self, inputs):
            outputs = super().forward(inputs)
            dtypes.append(outputs.dtype)
            return {"scores": outputs, "count": torch.tensor(1), "list": [outputs]}

    outputs = AutocastModule(Recorder(4, 2), "cpu", torch.bfloat16)(torch.ones(1, 4))
    assert dtypes == [torch.bfloat16]
    assert outputs["scores"].dtype == outputs["list"][0].dtype == torch.float32
    assert outputs["count"].dtype == torch.int64
    assert to_float32((torch.ones(1),))[0].dtype == torch.float32


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_weights_in_bf16_and_float32_differ_only_by_rounding(rank_info, tiny_shards, tmp_path, engine):
    exact, _ = train_toy(rank_info, tiny_shards, tmp_path / "fp32", tiny_task(tiny_shards, engine=engine))
    task = tiny_task(tiny_shards, engine=engine, tune={"precision": "bf16"})
    rough, _ = train_toy(rank_info, tiny_shards, tmp_path / "bf16", task)
    gap = max((weights_of(exact)[name] - weight).abs().max() for name, weight in weights_of(rough).items())
    assert 0 < gap < 0.05


def test_the_configuration_has_the_run_s_networks_and_the_new_training(tiny_shards, tmp_path):
    task = tiny_task(tiny_shards, seed=3, augment=plain_augment(flip=0.0))
    run = tiny_run(tiny_shards, tmp_path)
    config = build_run_config(task, run, tmp_path / "job", num_samples=48)
    assert config.model == run.model and config.grid == run.grid
    assert config.views == replace(
        run.views, crop=replace(run.views.crop, scale=(0.5, 1.0)), flip=replace(run.views.flip, probability=0.0)
    )
    assert (config.seed, config.optim.global_batch_size, config.optim.lr_end) == (3, 8, 0.0)
    assert config.output.folder == str(tmp_path / "job")
    assert task_folder("runs/a", "finetune", "weak").as_posix() == "runs/a/evaluations/finetune_weak"


@pytest.mark.parametrize(("chosen", "expected"), [(None, "bf16"), ("fp32", "fp32")])
def test_the_precision_is_that_of_the_run_unless_it_is_set(tiny_shards, tmp_path, chosen, expected):
    run = tiny_run(tiny_shards, tmp_path)
    run = replace(run, optim=replace(run.optim, precision="bf16"))
    task = tiny_task(tiny_shards, tune={"precision": chosen})
    assert build_run_config(task, run, tmp_path / "job", num_samples=48).optim.precision == expected


def test_batch_sizes_that_do_not_divide_are_refused_by_setting_name(tiny_shards):
    with pytest.raises(ValueError, match=r"tune.global_batch_size must be a multiple of the 3 ranks, got 8"):
        split_global_batch(tiny_task(tiny_shards), 3)
    with pytest.raises(ValueError, match=r"runtime.micro_batch_size must .*tune.global_batch_size = 8, got 3"):
        split_global_batch(tiny_task(tiny_shards, runtime={"micro_batch_size": 3}), 1)


def test_predictions_are_in_the_order_of_the_samples(rank_info, tiny_shards, tmp_path):
    context, samples = toy_context(rank_info, tiny_shards, tmp_path), np.array([40, 3, 17, 5])
    assert map_validation_images(lambda batch: batch.sample, context, samples).tolist() == samples.tolist()
    assert map_validation_images(lambda batch: batch.sample, context).tolist() == list(range(48))
    means = map_validation_images(lambda batch: batch.source_view.mean(dim=(1, 2, 3)), context, samples)
    (third,) = map_validation_images(lambda batch: batch.source_view.mean(dim=(1, 2, 3)), context, samples[2:3])
    assert means[2] == third and len(set(means.tolist())) == 4
