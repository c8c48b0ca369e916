"""Several tasks in one predictor: what belongs to one reaches no other, and budgets are what they are said to be."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.painted_shards import painted_run, tuning
from iwm_fast import world_model
from iwm_fast.config.evaluation import EvalData
from iwm_fast.config.finetuning import AugmentConfig, MultitaskConfig
from iwm_fast.engines.optimizer import scaled_optimizer
from iwm_fast.evals.finetuning.run import run_config
from iwm_fast.evals.multitask.evaluate import check_split, evaluate_multitask, share_of_one
from iwm_fast.evals.multitask.network import Division, TaskInputs, TaskPredictor, weighted_loss
from iwm_fast.evals.results import read_result
from iwm_fast.pipelines.annotations.labels import Labels
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.sampling.masks import all_patches
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.schedules import build_schedules

PLACE = RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
PLAIN = AugmentConfig(crop_scale=(0.6, 1.0), flip=0.0, rand_augment=False, mixup=0.0, cutmix=0.0, erasing=0.0)
TASKS = "left: {label: cls}\nright: {label: json.right}\n"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return painted_run(tmp_path_factory.mktemp("multitask"))


@pytest.fixture
def rank_info():
    yield distributed.start("cpu")
    distributed.stop()


@pytest.fixture
def config(run_folder, tmp_path):
    """Function: what a test varies, the file of tasks -> settings of a short task."""

    def build(name="", tasks=TASKS, augment=PLAIN, single=True, data=None, **changes):
        path = tmp_path / "tasks.yaml"
        path.write_text(tasks)
        given = {"data": data or EvalData(), "single": single, "name": name, "augment": augment}
        return MultitaskConfig(run=run_folder, tasks=str(path), **given, **tuning(**changes))

    return build


@pytest.fixture
def network(tiny_config):
    """A predictor on 4 x 4 patches for three tasks of 2, 3 and 4 classes."""
    torch.manual_seed(0)
    model = world_model.untrained(tiny_config())
    return TaskPredictor(model.predictor.requires_grad_(True), [2, 3, 4])


def inputs_of(task):
    tokens = torch.randn(len(task), 16, 16, generator=torch.Generator().manual_seed(1))
    rows = tuple((torch.tensor(task) == number).nonzero().flatten() for number in range(3))
    everything = all_patches(len(task), 16)
    action = torch.zeros(len(task), 7)
    return TaskInputs(tokens=tokens, action=action, everything=everything, task=torch.tensor(task), rows=rows)


def test_each_image_is_scored_under_its_own_task_alone(network):
    scores = network(inputs_of([0, 1, 2, 0]))
    assert [one.shape for one in scores] == [(2, 2), (1, 3), (1, 4)]
    scores[1].square().sum().backward()
    assert [bool(token.grad.any()) if token.grad is not None else False for token in network.tokens] == [
        False,
        True,
        False,
    ]
    heads = [any(p.grad is not None and p.grad.any() for p in head.parameters()) for head in network.heads]
    assert heads == [False, True, False]


def test_the_token_tells_the_predictor_which_task_is_meant(network):
    under = [network.predicted(replace(inputs_of([0, 0]), task=torch.tensor([task, task]))) for task in range(3)]
    assert not torch.allclose(under[0], under[1], atol=1e-4) and not torch.allclose(under[1], under[2], atol=1e-4)
    mixed = network.predicted(replace(inputs_of([0, 0]), task=torch.tensor([0, 2])))
    torch.testing.assert_close(mixed, torch.stack([under[0][0], under[2][1]]))


def test_tokens_do_not_decay_and_learn_as_fast_as_heads(network, tiny_config):
    optimizer = scaled_optimizer(
        network, tiny_config().optim, lambda name: 0.1 if name.startswith("predictor.") else 1.0
    )
    of_tokens = [group for group in optimizer.param_groups if any(p is network.tokens[0] for p in group["params"])]
    assert [group["name"] for group in of_tokens] == ["no_decay"] and of_tokens[0]["lr_scale"] == 1.0
    assert all(0 < token.std() < 0.04 for token in network.tokens)


def labels_of(numbers, classes):
    names = tuple(str(number) for number in range(classes))
    return Labels(field="cls", number=np.array(numbers), classes=names)


@pytest.mark.parametrize("augment", ["plain", "mixed"])
def test_a_batch_is_divided_by_slot_and_mixed_within_tasks(config, make_batch, augment):
    everything = [range(16)] * 12
    batch = replace(make_batch(everything, everything), slot=torch.arange(24, 36))
    # every image shows its task
    task = torch.arange(12) % 3
    batch = replace(batch, source_view=task.float()[:, None, None, None].expand(-1, 3, 16, 16).contiguous())
    labels = [labels_of(np.arange(12) % 2, 2), labels_of(np.arange(12) % 3, 3), labels_of(np.arange(12) % 4, 4)]
    changes = {} if augment == "plain" else {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}
    few = share_of_one(config(augment=replace(PLAIN, **{"label_smoothing": 0.0} | changes), global_batch_size=12), 3)
    seen = []
    divide = Division(labels, few, lambda view: (seen.append(view), view.flatten(2).transpose(1, 2))[1], PLACE)
    torch.manual_seed(0)
    np.random.seed(0)
    inputs = divide(batch)
    assert inputs.task.tolist() == task.tolist() and [len(rows) for rows in inputs.rows] == [4, 4, 4]
    # mixing weighs images against each other to the last bit or so
    torch.testing.assert_close(seen[0], batch.source_view)
    assert [shares.shape[1] for shares in inputs.labels] == [2, 3, 4] and not inputs.action.any()
    for rows, shares, own in zip(inputs.rows, inputs.labels, labels, strict=True):
        torch.testing.assert_close(shares.sum(1), torch.ones(4))
        if augment == "plain":
            assert shares.argmax(1).tolist() == own.number[rows.numpy()].tolist() and (shares.max(1).values == 1).all()
        else:
            assert (shares > 0).all()


def test_the_loss_is_the_weighted_sum_over_images__by_hand():
    scores = [torch.log(torch.tensor([[0.25, 0.75], [0.5, 0.5]])), torch.log(torch.tensor([[0.2, 0.8]]))]
    labels = [torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[0.5, 0.5]])]
    wanted = -2 * (np.log(0.75) + np.log(0.5)) - 0.5 * 0.5 * (np.log(0.2) + np.log(0.8))
    assert float(weighted_loss(scores, labels, [2.0, 0.5])) == pytest.approx(wanted)


def test_a_task_alone_has_as_many_steps_and_its_share_of_each_batch(config):
    whole = config(global_batch_size=12, epochs=7.0, warmup_epochs=1.5, micro_batch_size=6)
    few = share_of_one(whole, 3)
    assert (few.tune.global_batch_size, few.runtime.micro_batch_size) == (4, 2)
    model_config = world_model.load(whole.run).config
    schedules = [build_schedules(run_config(one, model_config, Path("x")).optim, 48) for one in (whole, few)]
    assert schedules[0].total_steps == schedules[1].total_steps == 28
    assert [schedules[0].lr(step) for step in range(28)] == pytest.approx([schedules[1].lr(step) for step in range(28)])
    assert share_of_one(whole, 1) == whole


def test_one_predictor_learns_both_tasks_beside_one_each(rank_info, config):
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


def test_a_single_task_in_the_list_is_that_task_alone_and_nothing_is_trained_twice(rank_info, config):
    given = config("one", "left: {label: cls, weight: 3}", epochs=1.0)
    result = evaluate_multitask(given)
    together, alone = result.row("left", "accuracy"), result.row("left alone", "accuracy")
    assert (together.value, together.num_tuned) == (alone.value, alone.num_tuned)
    folder = Path(given.run) / "evaluations" / "multitask_one"
    weights = [world_model_weights(folder / name) for name in ("multitask", "alone_left")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert evaluate_multitask(given).rows == result.rows


def world_model_weights(folder):
    from iwm_fast.checkpoints import checkpoint

    saved, refused = checkpoint.read_newest(folder)
    assert saved is not None and not refused
    return saved.weights("")


def test_without_single_predictors_there_is_no_control(rank_info, config):
    result = evaluate_multitask(config("together", single=False, epochs=0.5))
    assert [row.subject for row in result.rows] == ["left", "right", "mean"]
    assert all(row.control is None and not row.control_name for row in result.rows)


def test_augmented_images_keep_their_tasks(rank_info, config):
    augment = AugmentConfig(crop_scale=(0.6, 1.0), flip=0.0, rand_augment=False)
    result = evaluate_multitask(config("mixed", augment=augment, single=False, epochs=0.5))
    assert result.details["steps"] == 3


WRONG = {
    "tasks": ({"global_batch_size": 9}, r"tune\.global_batch_size must be a multiple of the 2 tasks, got 9"),
    "micro": ({"global_batch_size": 6, "micro_batch_size": 3}, r"micro_batch_size .* multiple of the 2 tasks, got 3"),
    "ranks": ({"global_batch_size": 6}, r"runtime\.micro_batch_size \(tune\.global_batch_size / ranks where unset\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_batches_that_cannot_be_divided_are_refused(config, case):
    changes, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        check_split(config(**changes), 2, world_size=2 if case == "ranks" else 1)


def test_mixing_needs_two_images_of_each_task(config):
    mixed = config(augment=replace(PLAIN, mixup=0.8), global_batch_size=6)
    with pytest.raises(
        ValueError, match=r"multiple of twice the 2 tasks where augment\.mixup or augment\.cutmix is above 0"
    ):
        check_split(mixed, 2, world_size=1)
    check_split(replace(mixed, augment=PLAIN), 2, world_size=1)


def test_what_cannot_be_learnt_is_said_before_anything_is_trained(rank_info, config, run_folder):
    def refusal(kind, **changes):
        with pytest.raises(kind) as caught:
            evaluate_multitask(config("wrong", **changes))
        return str(caught.value)

    assert "no 'size'" in refusal(ShardError, tasks="a: {label: json.size}")
    assert "not one of the classes" in refusal(ShardError, tasks="a: {label: json.right, classes: [red, green]}")
    assert "weight must be a number above 0" in refusal(ValueError, tasks="a: {label: cls, weight: -1}")
    with pytest.raises(ValueError, match=r"data\.label must be left unset: the file of tasks names the labels"):
        config(data=EvalData(label="json.right"))
    assert not (Path(run_folder) / "evaluations" / "multitask_wrong").exists()


def test_a_run_without_a_predictor_is_refused(config, tmp_path):
    folder = painted_run(tmp_path / "identity", num_train=16, num_val=4, depth=0)
    distributed.start("cpu")
    try:
        with pytest.raises(ValueError, match="run must have a predictor"):
            evaluate_multitask(replace(config(), run=folder))
    finally:
        distributed.stop()
