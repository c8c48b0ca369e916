"""Probes on frozen features: what they can learn they learn, and validation has no say in how."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

import iwm_fast
from fixtures.tinted_shards import tinted_run, write_tinted
from iwm_fast.checkpoints.export import export
from iwm_fast.config.commands import ExportConfig
from iwm_fast.config.evaluation import AttentiveConfig, EvalData, LinearConfig, ProbeConfig
from iwm_fast.evals.probing.attentive import AttentiveGrid, evaluate_attentive
from iwm_fast.evals.probing.feature_batches import Examples, mixed_windows
from iwm_fast.evals.probing.head_grid import Tried, choose, points_of, score, train_grid
from iwm_fast.evals.probing.linear import LinearGrid, evaluate_linear
from iwm_fast.evals.probing.probe import probe, split
from iwm_fast.evals.results import read_result
from iwm_fast.models.heads import AttentiveHead
from iwm_fast.pipelines.errors import ShardError

SETTINGS = ProbeConfig(epochs=20, batch_size=32, lrs=(0.1, 0.01), weight_decays=(0.0, 0.1))
TINT = EvalData(label="json.look.tint")


def examples(rows: np.ndarray, label: np.ndarray, **settings) -> Examples:
    return Examples(rows=rows, label=label, chosen=np.arange(len(rows)), **settings)


def planted(count: int, seed: int, *, strength: float, tokens: int = 0) -> Examples:
    """Noise in which the class shifts one feature, of all tokens if there are some."""
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 3, count)
    shape = (count, tokens, 8) if tokens else (count, 8)
    rows = generator.normal(size=shape).astype(np.float16 if tokens else np.float32)
    rows[..., :3] += strength * np.eye(3)[label].reshape((count, *([1] if tokens else []), 3))
    return examples(rows, label)


KINDS = {"linear": (LinearGrid, 0), "attentive": (partial(AttentiveGrid, seed=0), 4)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_finds_what_features_tell_and_guesses_where_they_tell_nothing(kind):
    build, tokens = KINDS[kind]
    accuracies = []
    for strength in (4.0, 0.0):
        parts = (planted(count, count, strength=strength, tokens=tokens) for count in (400, 300))
        accuracies.append(probe(*parts, 3, build, replace(SETTINGS, epochs=8)).correct.mean())
    assert accuracies[0] > 0.9 and 0.2 < accuracies[1] < 0.45


def test_hyperparameters_are_chosen_on_the_held_out_part_though_others_are_better_on_validation():
    train, val = planted(400, 0, strength=4.0), planted(300, 1, strength=4.0)
    # validation turns every class into the next: whoever learns is wrong there, who learns nothing is right by a third
    val = replace(val, label=(val.label + 1) % 3)
    settings = replace(SETTINGS, lrs=(1e-60, 0.1), weight_decays=(0.0,))
    found = probe(train, val, 3, LinearGrid, settings)
    idle, learnt = found.tried
    assert found.chosen == learnt and learnt.accuracy > 0.9 and idle.accuracy < 0.5
    assert found.correct.mean() < 0.1
    alone = probe(train, val, 3, LinearGrid, replace(settings, lrs=(1e-60,)))
    assert alone.correct.mean() > 0.2, "the trap is none"


def test_what_is_held_out_is_not_learnt_from():
    train = planted(400, 0, strength=4.0)
    _, held = split(400, SETTINGS.holdout, SETTINGS.seed)
    spoilt = train.rows.copy()
    spoilt[held] *= -5
    val = planted(300, 1, strength=4.0)
    whole, other = (probe(part, val, 3, LinearGrid, replace(SETTINGS, lrs=(0.1,), weight_decays=(0.0,)))
                    for part in (train, examples(spoilt, train.label)))  # fmt: skip
    assert np.array_equal(whole.correct, other.correct)
    assert other.tried[0].accuracy < 0.1 < whole.tried[0].accuracy


@pytest.mark.parametrize("kind", KINDS)
def test_heads_trained_together_are_those_trained_alone(kind):
    build, tokens = KINDS[kind]
    part = planted(100, 0, strength=1.0, tokens=tokens)
    points = points_of(SETTINGS)
    assert points == ((0.1, 0.0), (0.1, 0.1), (0.01, 0.0), (0.01, 0.1))
    together = build(part, 3, len(points))
    train_grid(together, part, points, SETTINGS)
    for number, point in enumerate(points):
        alone = build(part, 3, 1)
        train_grid(alone, part, (point,), SETTINGS)
        for one, other in zip(together.heads[number].parameters(), alone.heads[0].parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together.heads[0].get_parameter("linear.weight" if tokens else "weight"),
                              together.heads[1].get_parameter("linear.weight" if tokens else "weight"))  # fmt: skip


def test_the_linear_probe_is_softmax_regression_by_adamw():
    part = planted(64, 0, strength=1.0)
    settings = replace(SETTINGS, epochs=5, batch_size=64, lrs=(0.1,), weight_decays=(0.5,))
    grid = LinearGrid(part, 3, 1)
    train_grid(grid, part, points_of(settings), settings)
    rows = torch.from_numpy(part.rows)
    rows = (rows - rows.mean(dim=0)) / (rows.var(dim=0, unbiased=False) + 1e-6).sqrt()
    weight, bias = torch.zeros(3, 8, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "weight_decay": 0.0}], lr=0.1
    )
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 + math.cos(math.pi * step / 5)) / 2
        optimizer.zero_grad()
        functional.cross_entropy(rows @ weight.T + bias, torch.from_numpy(part.label)).backward()
        optimizer.step()
    torch.testing.assert_close(grid.heads[0].get_parameter("weight"), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grid.heads[0].get_parameter("bias"), bias, rtol=1e-4, atol=1e-5)


def test_scale_and_offset_of_features_do_not_matter():
    part, asked = planted(200, 0, strength=1.0), planted(100, 1, strength=1.0)
    scale, offset = 2.0 ** np.arange(-4, 4, dtype=np.float32), np.float32(64)
    moved = [replace(one, rows=one.rows * scale + offset) for one in (part, asked)]
    right = [probe(*pair, 3, LinearGrid, SETTINGS).correct for pair in ((part, asked), moved)]
    assert (right[0] == right[1]).mean() > 0.97
    constant = part.rows.copy()
    constant[:, 7] = 5.0
    assert probe(replace(part, rows=constant), asked, 3, LinearGrid, SETTINGS).correct.mean() > 0.5


def test_an_attentive_head_is_attention_with_keys_and_values_of_every_token():
    torch.manual_seed(0)
    head, tokens = AttentiveHead(128, 5).double(), torch.randn(3, 7, 128, dtype=torch.double, requires_grad=True)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    key, value = head.to_key(head.norm(tokens)), head.to_value(head.norm(tokens))
    key, value = (part.unflatten(-1, (2, 64)).transpose(1, 2) for part in (key, value))
    query = head.to_query(head.query).view(1, 2, 1, 64).expand(3, -1, -1, -1)
    pooled = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(1) + head.query
    plain = head.linear(pooled + head.mlp(head.norm_pooled(pooled)))
    folded = head(tokens)
    torch.testing.assert_close(folded, plain)
    weight = torch.randn_like(plain)
    wanted = [tokens, *head.parameters()]
    for one, other in zip(*(torch.autograd.grad((out * weight).sum(), wanted) for out in (folded, plain)), strict=True):
        torch.testing.assert_close(one, other)


@given(st.lists(st.tuples(st.none() | st.floats(0, 1), st.floats(0, 9)), min_size=1))
def test_the_most_accurate_point_is_chosen_and_of_equal_ones_that_of_smaller_loss(found):
    tried = tuple(
        Tried(lr=1.0, weight_decay=0.0, accuracy=accuracy, loss=None if accuracy is None else loss)
        for accuracy, loss in found
    )
    if all(accuracy is None for accuracy, _ in found):
        with pytest.raises(ValueError, match=r"lrs must let one head at least learn: .* smaller learning rates"):
            choose(tried)
        return
    best = tried[choose(tried)]
    for one in tried:
        assert one.accuracy is None or (one.accuracy, -one.loss) <= (best.accuracy, -best.loss)


def test_a_head_that_diverges_is_not_chosen_and_spoils_no_other():
    train, val = planted(200, 0, strength=4.0), planted(100, 1, strength=4.0)
    rows = replace(SETTINGS, lrs=(3e37, 0.1), weight_decays=(0.0,))
    found, alone = (probe(train, val, 3, LinearGrid, settings) for settings in (rows, replace(rows, lrs=(0.1,))))
    assert found.tried[0].accuracy is None and found.tried[0].loss is None
    assert found.chosen.lr == 0.1 and np.array_equal(found.correct, alone.correct)
    with pytest.raises(ValueError, match=r"lrs must let one head at least learn"):
        probe(train, val, 3, LinearGrid, replace(rows, lrs=(3e37,)))


@given(st.integers(2, 500), st.floats(0.001, 0.999), st.integers(0, 5))
def test_a_split_leaves_out_a_share_and_loses_nothing(count, holdout, seed):
    fit, held = split(count, holdout, seed)
    assert sorted([*fit, *held]) == list(range(count)) and len(held) == round(holdout * count)
    assert (np.diff(fit) > 0).all() and (np.diff(held) > 0).all()
    assert np.array_equal(held, split(count, holdout, seed)[1])


def test_another_seed_holds_out_others():
    assert not np.array_equal(split(100, 0.1, 0)[1], split(100, 0.1, 1)[1])


@given(st.sets(st.integers(0, 300), min_size=1), st.integers(1, 40), st.integers(1, 40))
def test_windows_hold_each_row_once_in_few_runs(chosen, run, size):
    rows = np.array(sorted(chosen))
    windows = list(mixed_windows(rows, run, size, np.random.default_rng(0)))
    assert sorted(np.concatenate(windows)) == sorted(chosen)
    assert [len(window) for window in windows[:-1]] == [size] * (len(windows) - 1)
    for window in windows:
        place = np.searchsorted(rows, np.sort(window))
        assert (np.diff(place) > 1).sum() + 1 <= math.ceil(size / run) + 2


@pytest.mark.parametrize("window_bytes", [10**9, 10 * 32])
def test_a_mixed_epoch_has_each_example_once_with_its_label_in_an_order_of_its_own(tmp_path, window_bytes):
    rows = np.arange(60 * 8, dtype=np.float32).reshape(60, 8)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    part = Examples(rows=mapped, label=np.arange(60) * 10, chosen=np.arange(0, 60, 2), run_bytes=3 * 32,
                    window_bytes=window_bytes)  # fmt: skip
    batches = list(part.mixed(4, 3, seed=0))
    assert [len(label) for _, label in batches] == [4, 4, 4, 4, 4, 4, 4, 2] * 3
    for content, label in batches:
        assert np.array_equal(content.numpy(), rows[label.numpy() // 10])
    epochs = [torch.cat([label for _, label in batches[first : first + 8]]).tolist() for first in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(0, 600, 20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # runs of three are mixed, too
    assert all((np.diff(epoch) == 20).sum() < 10 for epoch in epochs)
    again, other = (torch.cat([label for _, label in part.mixed(4, 3, seed)]).tolist() for seed in (0, 1))
    assert again == [label for epoch in epochs for label in epoch] != other


def test_examples_in_order_come_once_and_in_order():
    part = examples(np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6))
    part = replace(part, chosen=np.array([0, 2, 3, 5]))
    batches = list(part.in_order(3))
    assert [label.tolist() for _, label in batches] == [[0, 2, 3], [5]]
    assert torch.cat([rows for rows, _ in batches])[:, 0].tolist() == [0, 4, 6, 10]


def test_accuracy_and_loss_of_each_head_are_those_of_the_formula():
    part = examples(np.eye(2, dtype=np.float32), np.array([0, 0]))
    grid = LinearGrid(part, 2, 2)
    grid.heads[1].get_parameter("weight").data[:] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    correct, loss = score(grid, part, batch_size=1)
    # standardised rows are (1, -1) and (-1, 1): scores are (2, -2) and (-2, 2)
    assert correct.tolist() == [[True, True], [True, False]]
    np.testing.assert_allclose(
        loss, [math.log(2), math.log(1 + math.exp(4)) / 2 + math.log(1 + math.exp(-4)) / 2], rtol=1e-5
    )
    grid.heads = grid.heads[1:]
    assert score(grid, part, 1)[0].tolist() == [[True, False]]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return tinted_run(tmp_path_factory.mktemp("tinted"))


TASKS = {
    "linear": (evaluate_linear, LinearConfig(epochs=20, batch_size=16, holdout=0.25)),
    "attentive": (evaluate_attentive, AttentiveConfig(epochs=20, batch_size=16, holdout=0.25)),
}


@pytest.mark.parametrize("task", TASKS)
def test_an_evaluation_names_what_images_tell_beside_control_and_chance(run_folder, task):
    evaluate, config = TASKS[task]
    tint, cls = (evaluate(replace(config, run=str(run_folder), data=data)) for data in (TINT, EvalData()))
    row, guess = (result.row("encoder", "accuracy") for result in (tint, cls))
    assert row.value == 1.0 and row.chance == pytest.approx(1 / 3) and row.control_name == "untrained encoder"
    assert guess.value < 0.9 and guess.chance == 0.5 and guess.low < guess.value < guess.high
    assert row.num_samples == 12 and row.time_s > 0 and row.images_per_s > 0
    assert tint.details["num_fit"] == 36 and tint.details["num_held_out"] == 12
    assert tint.details["most_common_class"] == 0.5
    assert len(tint.details["held_out"]) == len(config.lrs) * len(config.weight_decays)
    assert tint.details["chosen"] in tint.details["held_out"]
    if task == "linear":
        assert row.num_tuned == 32 * 3 + 3
    else:
        assert row.num_tuned == sum(one.numel() for one in AttentiveHead(32, 3).parameters())
    saved = read_result(run_folder / "evaluations" / f"{task}_json.look.tint.json")
    assert saved.rows == tint.rows and saved.step == 3


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_result_and_features_are_read(run_folder, task, caplog):
    evaluate, config = TASKS[task]
    config = replace(config, run=str(run_folder), seed=5)
    first = evaluate(config)
    caplog.set_level("INFO")
    second = evaluate(config)
    assert first.details == second.details
    assert [replace(row, time_s=None, images_per_s=None) for row in first.rows] == [
        replace(row, time_s=None, images_per_s=None) for row in second.rows
    ]
    assert "encoded at step" not in caplog.text


def test_the_control_is_the_same_probe_on_the_untrained_encoder(run_folder):
    config = replace(TASKS["linear"][1], run=str(run_folder))
    result = evaluate_linear(config)
    assert result.details["control_held_out"] != result.details["held_out"]
    other = evaluate_linear(replace(config, seed=1))
    assert other.details["control_held_out"] != result.details["control_held_out"]


def test_an_export_is_probed_like_its_run(run_folder, tmp_path):
    folder = export(ExportConfig(run=str(run_folder), to=str(tmp_path / "export")))
    config = replace(TASKS["linear"][1], run=str(run_folder))
    with pytest.raises(ValueError, match=r"data\.train must name the training shards"):
        evaluate_linear(replace(config, run=str(folder)))
    data = EvalData(train=str(run_folder.parent / "train.tar"), val=str(run_folder.parent / "val.tar"))
    exported = evaluate_linear(replace(config, run=str(folder), data=data)).row("encoder", "accuracy")
    own = evaluate_linear(config).row("encoder", "accuracy")
    assert (exported.value, exported.num_tuned) == (own.value, own.num_tuned)
    assert len(list((folder / "features").glob("*/rows.npy"))) == 4
    assert iwm_fast.load(folder).step == 3, "the export is as whole as before"


@pytest.mark.parametrize("task", TASKS)
def test_what_cannot_be_probed_is_refused_with_address_and_remedy(run_folder, tmp_path, task):
    evaluate, config = TASKS[task]
    config = replace(config, run=str(run_folder))
    train = write_tinted(tmp_path / "cut.tar", 6, 0, bad=2)
    wrong = {
        r"train\.tar: sample '000': its \.json has no field 'animal'": {"data": EvalData(label="json.animal")},
        r"val\.tar: sample '098': json\.name is integer 98, which is not one": {"data": EvalData(label="json.name")},
        r"cut\.tar: sample '002': cannot decode the image": {"data": EvalData(train=train)},
    }
    for message, change in wrong.items():
        with pytest.raises(ShardError, match=message):
            evaluate(replace(config, **change))
    with pytest.raises(ValueError, match=r"holdout must leave images .* of 2; raise max_train_samples or .* got 0\.01"):
        evaluate(replace(config, holdout=0.01, max_train_samples=2))


def test_tokens_that_do_not_fit_are_refused_with_their_size(run_folder):
    config = replace(TASKS["attentive"][1], run=str(run_folder), max_cache_gb=1e-6)
    size = 2 * 60 * 16 * 32 * 2 / 1e9
    with pytest.raises(ValueError, match=rf"max_cache_gb must be at least {size:.4g}.*lower max_train_samples"):
        evaluate_attentive(config)


def test_a_weak_choice_of_hyperparameters_is_said(run_folder, caplog):
    caplog.set_level("INFO")
    config = replace(TASKS["linear"][1], run=str(run_folder), data=TINT, max_train_samples=4, lrs=(0.1, 0.01))
    evaluate_linear(config)
    assert "hyperparameters of 3 classes are chosen on 1 images: raise holdout" in caplog.text
    assert "ones may be better still" in caplog.text


@pytest.mark.gpu
def test_a_gpu_finds_what_the_cpu_finds(run_folder):
    for evaluate, config in TASKS.values():
        found = [
            evaluate(replace(config, run=str(run_folder), data=TINT, device=device)).row("encoder", "accuracy")
            for device in ("cpu", "cuda")
        ]
        assert [row.value for row in found] == [1.0, 1.0]
    rows = sorted((run_folder / "features").glob("*/rows.npy"), key=lambda path: path.stat().st_size)
    assert len(rows) == 16, "each device has its own"
