"""Several tasks in one predictor: tasks do not affect each other's images, and training budgets are comparable."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.painted_shards import finetune_settings, pretrain_on_painted_shards
from iwm_fast import world_model
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.config.evaluation import EvalDataConfig
from iwm_fast.config.finetuning import AugmentConfig, MultitaskConfig
from iwm_fast.engines.optimizer import build_scaled_optimizer
from iwm_fast.evals.finetuning.run import build_run_config
from iwm_fast.evals.multitask.evaluate import check_batch_split, evaluate_multitask, single_task_settings
from iwm_fast.evals.multitask.network import TaskBatcher, TaskInputs, TaskPredictor, weighted_loss
from iwm_fast.evals.results import read_result
from iwm_fast.pipelines.annotations.labels import Labels
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.sampling.masks import all_patches
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.schedules import build_schedules

RANK_INFO = RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
PLAIN = AugmentConfig(crop_scale=(0.6, 1.0), flip=0.0, rand_augment=False, mixup=0.0, cutmix=0.0, erasing=0.0)
TASKS = "left: {label: cls}\nright: {label: json.right}\n"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return pretrain_on_painted_shards(tmp_path_factory.mktemp("multitask"))


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


@pytest.fixture
def config(run_folder, tmp_path):
    """Function that returns the settings of a short training with changes."""

    def build(name="", tasks=TASKS, augment=PLAIN, single=True, data=None, **changes):
        path = tmp_path / "tasks.yaml"
        path.write_text(tasks)
        others = {"data": data or EvalDataConfig(), "single": single, "name": name, "augment": augment}
        return MultitaskConfig(run=run_folder, tasks=str(path), **others, **finetune_settings(**changes))

    return build


@pytest.fixture
def network(tiny_config):
    """A predictor on 4 x 4 patches for three tasks of 2, 3 and 4 classes."""
    torch.manual_seed(0)
    model = world_model.build_untrained(tiny_config())
    return TaskPredictor(model.predictor.requires_grad_(True), [2, 3, 4])


def make_inputs(task):
    tokens = torch.randn(len(task), 16, 16, generator=torch.Generator().manual_seed(1))
    indices = tuple((torch.tensor(task) == number).nonzero().flatten() for number in range(3))
    patches, action = all_patches(len(task), 16), torch.zeros(len(task), 7)
    return TaskInputs(tokens=tokens, action=action, patches=patches, task=torch.tensor(task), indices=indices)


def test_an_image_is_classified_with_token_and_head_of_its_task_only(network):
    logits = network(make_inputs([0, 1, 2, 0]))
    assert [task_logits.shape for task_logits in logits] == [(2, 2), (1, 3), (1, 4)]
    logits[1].square().sum().backward()
    tokens = [token.grad is not None and bool(token.grad.any()) for token in network.tokens]
    heads = [any(p.grad is not None and p.grad.any() for p in head.parameters()) for head in network.heads]
    assert tokens == heads == [False, True, False]


def test_the_task_token_changes_the_prediction(network):
    by_task = [
        network.predict_tokens(replace(make_inputs([0, 0]), task=torch.tensor([task, task]))) for task in range(3)
    ]
    assert not any(torch.allclose(by_task[task], by_task[task + 1], atol=1e-4) for task in range(2))
    mixed = network.predict_tokens(replace(make_inputs([0, 0]), task=torch.tensor([0, 2])))
    torch.testing.assert_close(mixed, torch.stack([by_task[0][0], by_task[2][1]]))


def test_tokens_have_no_weight_decay_and_the_learning_rate_of_heads(network, tiny_config):
    optimizer = build_scaled_optimizer(
        network, tiny_config().optim, lambda name: 0.1 if name.startswith("predictor.") else 1.0
    )
    token_groups = [group for group in optimizer.param_groups if any(p is network.tokens[0] for p in group["params"])]
    assert [group["name"] for group in token_groups] == ["no_decay"] and token_groups[0]["lr_scale"] == 1.0
    assert all(0 < token.std() < 0.04 for token in network.tokens)


def make_labels(num_classes):
    """Return labels of 12 samples whose class is the sample number modulo the number of classes."""
    names = tuple(str(number) for number in range(num_classes))
    return Labels(field="cls", number=np.arange(12) % num_classes, classes=names)


@pytest.mark.parametrize("augment", ["plain", "mixed"])
def test_images_are_assigned_by_slot_and_mixed_within_their_task(config, make_batch, augment):
    all_visible = [range(16)] * 12
    batch = replace(make_batch(all_visible, all_visible), slot=torch.arange(24, 36))
    # The pixels of an image equal the number of its task.
    task = torch.arange(12) % 3
    batch = replace(batch, source_view=task.float()[:, None, None, None].expand(-1, 3, 16, 16).contiguous())
    labels = [make_labels(num_classes) for num_classes in (2, 3, 4)]
    changes = {} if augment == "plain" else {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
    settings = config(augment=replace(PLAIN, **{"label_smoothing": 0.0} | changes), global_batch_size=12)
    # This encoder returns the pixels as tokens of width 3.
    batcher = TaskBatcher(
        labels, single_task_settings(settings, 3), lambda view: view.flatten(2).transpose(1, 2), RANK_INFO
    )
    torch.manual_seed(0)
    np.random.seed(0)
    inputs = batcher(batch)
    assert inputs.task.tolist() == task.tolist() and [len(indices) for indices in inputs.indices] == [4, 4, 4]
    # Mixing images of one task does not change them, up to rounding, because they are equal.
    torch.testing.assert_close(inputs.tokens, batch.source_view.flatten(2).transpose(1, 2))
    assert [soft_labels.shape[1] for soft_labels in inputs.labels] == [2, 3, 4] and not inputs.action.any()
    for indices, soft_labels, task_labels in zip(inputs.indices, inputs.labels, labels, strict=True):
        torch.testing.assert_close(soft_labels.sum(1), torch.ones(4))
        if augment == "plain":
            assert soft_labels.argmax(1).tolist() == task_labels.number[indices.numpy()].tolist()
            assert (soft_labels.max(1).values == 1).all()
        else:
            assert (soft_labels > 0).all()


def test_the_loss_is_the_weighted_sum_over_images():
    logits = [torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5]])), torch.log(torch.tensor([[0.2, 0.8]]))]
    labels = [torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.5, 0.5]])]
    expected = -2 * (np.log(0.75) + np.log(0.5)) - 0.5 * 0.5 * (np.log(0.2) + np.log(0.8))
    assert float(weighted_loss(logits, labels, [2.0, 0.5])) == pytest.approx(expected)


def test_a_single_task_has_the_same_steps_and_its_share_of_each_batch(config):
    multitask = config(global_batch_size=12, epochs=7.0, warmup_epochs=1.5, micro_batch_size=6)
    single = single_task_settings(multitask, 3)
    assert (single.tune.global_batch_size, single.runtime.micro_batch_size) == (4, 2)
    model_config = world_model.load(multitask.run).config
    configs = [
        build_run_config(settings, model_config, Path("unused"), num_samples=48) for settings in (multitask, single)
    ]
    schedules = [build_schedules(config.optim, 48) for config in configs]
    assert schedules[0].total_steps == schedules[1].total_steps == 28
    assert [schedules[0].lr(step) for step in range(28)] == pytest.approx([schedules[1].lr(step) for step in range(28)])
    assert single_task_settings(multitask, 1) == multitask


def test_a_shared_predictor_and_single_ones_learn_both_tasks(rank_info, config):
    tasks = "red: {label: json.red}\nblue: {label: json.blue}"
    result = evaluate_multitask(config(tasks=tasks, global_batch_size=32, epochs=16.0))
    names = ["red", "blue", "mean", "red alone", "blue alone", "mean alone"]
    assert [row.subject for row in result.rows] == names and {row.metric for row in result.rows} == {"accuracy"}
    rows = {row.subject: row for row in result.rows}
    assert all(row.low <= row.value <= row.high and row.chance == 0.5 for row in result.rows)
    assert rows["mean"].value > 0.75 and rows["mean alone"].value > 0.75
    for name in ("red", "blue", "mean"):
        assert rows[name].control == rows[f"{name} alone"].value and rows[name].control_name == "alone"
    assert rows["mean"].value == pytest.approx((rows["red"].value + rows["blue"].value) / 2)
    gain = result.details["gain_of_sharing"]
    assert gain["accuracy"] == pytest.approx(rows["mean"].value - rows["mean alone"].value)
    assert gain["low"] <= gain["accuracy"] <= gain["high"]
    assert rows["mean alone"].num_tuned == rows["red alone"].num_tuned + rows["blue alone"].num_tuned
    shared = rows["mean alone"].num_tuned - rows["mean"].num_tuned
    predictor = world_model.load(result.settings["run"]).predictor
    assert shared == sum(parameter.numel() for parameter in predictor.parameters())
    assert result.details["images_of_each_task"] == result.details["steps"] * 16 == 24 * 16
    path = Path(result.settings["run"]) / "evaluations" / "multitask.json"
    assert read_result(path).rows == result.rows


def test_a_list_of_one_task_is_the_same_as_that_task_alone(rank_info, config):
    settings = config("one", "left: {label: cls, weight: 3}", epochs=1.0)
    result = evaluate_multitask(settings)
    multitask, alone = result.row("left", "accuracy"), result.row("left alone", "accuracy")
    assert (multitask.value, multitask.num_tuned) == (alone.value, alone.num_tuned)
    folder = Path(settings.run) / "evaluations" / "multitask_one"
    newest = [checkpoints.find_newest_folder(folder / name) for name in ("multitask", "alone_left")]
    weights = [checkpoints.read(path).weights("") for path in newest]
    # Corrected labels make another job.
    assert len(checkpoints.read(newest[0]).fingerprint["data.train.labels"]) == 1
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    # The second call reads both predictors: training again would give other durations.
    assert evaluate_multitask(settings).rows == result.rows


def test_without_single_predictors_there_is_no_control(rank_info, config):
    result = evaluate_multitask(config("together", single=False, epochs=0.5))
    assert [row.subject for row in result.rows] == ["left", "right", "mean"]
    assert all(row.control is None and not row.control_name for row in result.rows)


def test_training_runs_with_mixup_and_erasing(rank_info, config):
    augment = AugmentConfig(crop_scale=(0.6, 1.0), flip=0.0, rand_augment=False)
    result = evaluate_multitask(config("mixed", augment=augment, single=False, epochs=0.5))
    assert result.details["steps"] == 3


INVALID = {
    "tasks": ({"global_batch_size": 9}, r"tune\.global_batch_size must be a multiple of the 2 tasks, got 9"),
    "micro": ({"global_batch_size": 6, "micro_batch_size": 3}, r"micro_batch_size .* multiple of the 2 tasks, got 3"),
    "ranks": ({"global_batch_size": 6}, r"runtime\.micro_batch_size \(by default tune\.global_batch_size / ranks\)"),
}


@pytest.mark.parametrize("case", INVALID)
def test_batches_that_cannot_be_split_between_tasks_are_refused(config, case):
    changes, message = INVALID[case]
    with pytest.raises(ValueError, match=message):
        check_batch_split(config(**changes), 2, world_size=2 if case == "ranks" else 1)


def test_mixing_needs_two_images_of_each_task(config):
    mixed = config(augment=replace(PLAIN, mixup=0.8), global_batch_size=6)
    with pytest.raises(
        ValueError, match=r"multiple of twice the 2 tasks if augment\.mixup or augment\.cutmix is above 0"
    ):
        check_batch_split(mixed, 2, world_size=1)
    check_batch_split(replace(mixed, augment=PLAIN), 2, world_size=1)


def test_invalid_tasks_are_refused_before_training(rank_info, config, run_folder):
    def message_of(kind, **changes):
        with pytest.raises(kind) as caught:
            evaluate_multitask(config("invalid", **changes))
        return str(caught.value)

    assert "no field 'size'" in message_of(ShardError, tasks="a: {label: json.size}")
    assert "not one of the classes" in message_of(ShardError, tasks="a: {label: json.right, classes: [red, green]}")
    assert "weight must be a number above 0" in message_of(ValueError, tasks="a: {label: cls, weight: -1}")
    with pytest.raises(ValueError, match=r"data\.label must be left unset: the file of tasks names the labels"):
        config(data=EvalDataConfig(label="json.right"))
    assert not (Path(run_folder) / "evaluations" / "multitask_invalid").exists()


def test_a_run_without_a_predictor_is_refused(config, tmp_path):
    folder = pretrain_on_painted_shards(tmp_path / "identity", num_train=16, num_val=4, depth=0)
    distributed.start("cpu")
    try:
        with pytest.raises(ValueError, match="run must have a predictor"):
            evaluate_multitask(replace(config(), run=folder))
    finally:
        distributed.stop()
