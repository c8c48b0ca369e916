"""Probes on frozen features: what they learn, how hyperparameters are chosen, and how features are batched."""

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
from fixtures.tinted_shards import pretrain_on_tinted_shards, write_tinted_shard
from iwm_fast.checkpoints.export import export
from iwm_fast.config.commands import ExportConfig
from iwm_fast.config.evaluation import AttentiveConfig, EvalDataConfig, LinearConfig, ProbeConfig
from iwm_fast.evals.finetuning.networks import seeded_init
from iwm_fast.evals.probing.attentive import AttentiveGrid, evaluate_attentive
from iwm_fast.evals.probing.feature_batches import FeatureDataset, shuffle_windows
from iwm_fast.evals.probing.head_grid import Candidate, best_candidate, grid_points, score_heads, train_grid
from iwm_fast.evals.probing.linear import LinearGrid, evaluate_linear
from iwm_fast.evals.probing.probe import probe, split_holdout
from iwm_fast.evals.results import read_result
from iwm_fast.models.heads import AttentiveHead
from iwm_fast.pipelines.errors import ShardError

SETTINGS = ProbeConfig(epochs=20, batch_size=32, lrs=(0.1, 0.01), weight_decays=(0.0, 0.1))
TINT = EvalDataConfig(label="json.look.tint")


def dataset(features: np.ndarray, label: np.ndarray, **settings) -> FeatureDataset:
    return FeatureDataset(features=features, label=label, indices=np.arange(len(features)), **settings)


def planted(count: int, seed: int, *, strength: float, tokens: int = 0) -> FeatureDataset:
    """Return noise in which the class shifts one feature, or that feature of all tokens."""
    generator = np.random.default_rng(seed)
    label = generator.integers(0, 3, count)
    shape = (count, tokens, 8) if tokens else (count, 8)
    features = generator.normal(size=shape).astype(np.float16 if tokens else np.float32)
    features[..., :3] += strength * np.eye(3)[label].reshape((count, *([1] if tokens else []), 3))
    return dataset(features, label)


KINDS = {"linear": (LinearGrid, 0), "attentive": (partial(AttentiveGrid, seed=0), 4)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_probe_learns_from_features_and_guesses_from_noise(kind):
    build, tokens = KINDS[kind]
    accuracies = []
    for strength in (4.0, 0.0):
        datasets = (planted(count, count, strength=strength, tokens=tokens) for count in (400, 300))
        accuracies.append(probe(*datasets, 3, build, replace(SETTINGS, epochs=8)).correct.mean())
    assert accuracies[0] > 0.9 and 0.2 < accuracies[1] < 0.45


def test_hyperparameters_are_chosen_on_held_out_images_not_on_validation():
    train, val = planted(400, 0, strength=4.0), planted(300, 1, strength=4.0)
    # Validation labels are shifted by one class: a head that learns is wrong there, one that does not is right by 1/3.
    val = replace(val, label=(val.label + 1) % 3)
    settings = replace(SETTINGS, lrs=(1e-60, 0.1), weight_decays=(0.0,))
    result = probe(train, val, 3, LinearGrid, settings)
    idle, learnt = result.candidates
    assert result.best == learnt and learnt.accuracy > 0.9 and idle.accuracy < 0.5
    assert result.correct.mean() < 0.1
    idle_result = probe(train, val, 3, LinearGrid, replace(settings, lrs=(1e-60,)))
    assert idle_result.correct.mean() > 0.2, "the idle head is not better on validation, so the test has no power"


def test_held_out_images_are_not_trained_on():
    train = planted(400, 0, strength=4.0)
    _, held_out = split_holdout(400, SETTINGS.holdout, SETTINGS.seed)
    spoilt = train.features.copy()
    spoilt[held_out] *= -5
    val = planted(300, 1, strength=4.0)
    first, second = (
        probe(data, val, 3, LinearGrid, replace(SETTINGS, lrs=(0.1,), weight_decays=(0.0,)))
        for data in (train, dataset(spoilt, train.label))
    )
    assert np.array_equal(first.correct, second.correct)
    assert second.candidates[0].accuracy < 0.1 < first.candidates[0].accuracy


@pytest.mark.parametrize("kind", KINDS)
def test_heads_trained_together_equal_heads_trained_alone(kind):
    build, tokens = KINDS[kind]
    data = planted(100, 0, strength=1.0, tokens=tokens)
    points = grid_points(SETTINGS)
    assert points == ((0.1, 0.0), (0.1, 0.1), (0.01, 0.0), (0.01, 0.1))
    together = build(data, 3, len(points))
    train_grid(together, data, points, SETTINGS)
    for number, point in enumerate(points):
        alone = build(data, 3, 1)
        train_grid(alone, data, (point,), SETTINGS)
        for actual, expected in zip(together.heads[number].parameters(), alone.heads[0].parameters(), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    name = "linear.weight" if tokens else "weight"
    assert not torch.allclose(together.heads[0].get_parameter(name), together.heads[1].get_parameter(name))


def test_the_linear_probe_equals_softmax_regression_with_adamw():
    data = planted(64, 0, strength=1.0)
    settings = replace(SETTINGS, epochs=5, batch_size=64, lrs=(0.1,), weight_decays=(0.5,))
    grid = LinearGrid(data, 3, 1)
    train_grid(grid, data, grid_points(settings), settings)
    features = torch.from_numpy(data.features)
    features = (features - features.mean(dim=0)) / (features.var(dim=0, unbiased=False) + 1e-6).sqrt()
    weight, bias = torch.zeros(3, 8, requires_grad=True), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.AdamW(
        [{"params": [weight], "weight_decay": 0.5}, {"params": [bias], "weight_decay": 0.0}], lr=0.1
    )
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * (1 + math.cos(math.pi * step / 5)) / 2
        optimizer.zero_grad()
        functional.cross_entropy(features @ weight.T + bias, torch.from_numpy(data.label)).backward()
        optimizer.step()
    torch.testing.assert_close(grid.heads[0].get_parameter("weight"), weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grid.heads[0].get_parameter("bias"), bias, rtol=1e-4, atol=1e-5)


def test_the_linear_probe_ignores_scale_and_offset_of_features():
    train, val = planted(200, 0, strength=1.0), planted(100, 1, strength=1.0)
    scale, offset = 2.0 ** np.arange(-4, 4, dtype=np.float32), np.float32(64)
    moved = [replace(data, features=data.features * scale + offset) for data in (train, val)]
    correct = [probe(*pair, 3, LinearGrid, SETTINGS).correct for pair in ((train, val), moved)]
    assert (correct[0] == correct[1]).mean() > 0.97
    constant = train.features.copy()
    constant[:, 7] = 5.0
    assert probe(replace(train, features=constant), val, 3, LinearGrid, SETTINGS).correct.mean() > 0.5


def test_drawing_the_weights_of_a_head_changes_no_generator(monkeypatch):
    # Seeding without a GPU is recorded, and would be done later.
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("the generators of GPUs were seeded"))
    data, before = planted(8, 0, strength=1.0, tokens=4), torch.get_rng_state()
    first, same, other = (AttentiveGrid(data, 3, 1, seed=seed).heads[0].to_key.weight for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    with seeded_init(0):
        torch.rand(1)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_attentive_head_equals_attention_with_explicit_keys_and_values():
    torch.manual_seed(0)
    head, tokens = AttentiveHead(128, 5).double(), torch.randn(3, 7, 128, dtype=torch.double, requires_grad=True)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    key, value = head.to_key(head.norm(tokens)), head.to_value(head.norm(tokens))
    key, value = (tensor.unflatten(-1, (2, 64)).transpose(1, 2) for tensor in (key, value))
    query = head.to_query(head.query).view(1, 2, 1, 64).expand(3, -1, -1, -1)
    pooled = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(1) + head.query
    plain = head.linear(pooled + head.mlp(head.norm_pooled(pooled)))
    folded = head(tokens)
    torch.testing.assert_close(folded, plain)
    weight = torch.randn_like(plain)
    inputs = [tokens, *head.parameters()]
    gradients = (torch.autograd.grad((out * weight).sum(), inputs) for out in (folded, plain))
    for actual, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, expected)


@given(st.lists(st.tuples(st.none() | st.floats(0, 1), st.floats(0, 9)), min_size=1))
def test_the_most_accurate_candidate_is_best_then_that_with_smaller_loss(scores):
    candidates = tuple(
        Candidate(lr=1.0, weight_decay=0.0, accuracy=accuracy, loss=None if accuracy is None else loss)
        for accuracy, loss in scores
    )
    if all(accuracy is None for accuracy, _ in scores):
        with pytest.raises(ValueError, match=r"lrs must let at least one head converge, .* smaller learning rates"):
            best_candidate(candidates)
        return
    best = candidates[best_candidate(candidates)]
    for other in candidates:
        assert other.accuracy is None or (other.accuracy, -other.loss) <= (best.accuracy, -best.loss)


def test_a_head_that_diverges_is_not_chosen_and_does_not_affect_others():
    train, val = planted(200, 0, strength=4.0), planted(100, 1, strength=4.0)
    config = replace(SETTINGS, lrs=(3e37, 0.1), weight_decays=(0.0,))
    result, alone = (probe(train, val, 3, LinearGrid, settings) for settings in (config, replace(config, lrs=(0.1,))))
    assert result.candidates[0].accuracy is None and result.candidates[0].loss is None
    assert result.best.lr == 0.1 and np.array_equal(result.correct, alone.correct)
    with pytest.raises(ValueError, match=r"lrs must let at least one head converge"):
        probe(train, val, 3, LinearGrid, replace(config, lrs=(3e37,)))


@given(st.integers(2, 500), st.floats(0.001, 0.999), st.integers(0, 5))
def test_a_split_holds_out_a_share_and_covers_all_examples(count, holdout, seed):
    fit, held_out = split_holdout(count, holdout, seed)
    assert sorted([*fit, *held_out]) == list(range(count)) and len(held_out) == round(holdout * count)
    assert (np.diff(fit) > 0).all() and (np.diff(held_out) > 0).all()
    assert np.array_equal(held_out, split_holdout(count, holdout, seed)[1])


def test_another_seed_holds_out_other_images():
    assert not np.array_equal(split_holdout(100, 0.1, 0)[1], split_holdout(100, 0.1, 1)[1])


@given(st.sets(st.integers(0, 300), min_size=1), st.integers(1, 40), st.integers(1, 40))
def test_windows_contain_each_index_once_in_few_runs(subset, run_size, size):
    indices = np.array(sorted(subset))
    windows = list(shuffle_windows(indices, run_size, size, np.random.default_rng(0)))
    assert sorted(np.concatenate(windows)) == sorted(subset)
    assert [len(window) for window in windows[:-1]] == [size] * (len(windows) - 1)
    for window in windows:
        position = np.searchsorted(indices, np.sort(window))
        assert (np.diff(position) > 1).sum() + 1 <= math.ceil(size / run_size) + 2


@pytest.mark.parametrize("window_bytes", [10**9, 10 * 32])
def test_a_shuffled_epoch_has_each_example_once_with_its_label(tmp_path, window_bytes):
    rows = np.arange(60 * 8, dtype=np.float32).reshape(60, 8)
    np.save(tmp_path / "rows.npy", rows)
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
    data = FeatureDataset(features=mapped, label=np.arange(60) * 10, indices=np.arange(0, 60, 2), run_bytes=3 * 32,
                          window_bytes=window_bytes)  # fmt: skip
    batches = list(data.shuffled_batches(4, 3, seed=0))
    assert [len(label) for _, label in batches] == [4, 4, 4, 4, 4, 4, 4, 2] * 3
    for features, label in batches:
        assert np.array_equal(features.numpy(), rows[label.numpy() // 10])
    epochs = [torch.cat([label for _, label in batches[first : first + 8]]).tolist() for first in (0, 8, 16)]
    assert all(sorted(epoch) == list(range(0, 600, 20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    # The rows of a run are shuffled, too.
    assert all((np.diff(epoch) == 20).sum() < 10 for epoch in epochs)
    again, other = (torch.cat([label for _, label in data.shuffled_batches(4, 3, seed)]).tolist() for seed in (0, 1))
    assert again == [label for epoch in epochs for label in epoch] != other


def test_sequential_batches_have_each_example_once_in_order():
    data = dataset(np.arange(12, dtype=np.float32).reshape(6, 2), np.arange(6))
    data = replace(data, indices=np.array([0, 2, 3, 5]))
    batches = list(data.sequential_batches(3))
    assert [label.tolist() for _, label in batches] == [[0, 2, 3], [5]]
    assert torch.cat([features for features, _ in batches])[:, 0].tolist() == [0, 4, 6, 10]


def test_correctness_and_loss_of_each_head_follow_the_formula():
    data = dataset(np.eye(2, dtype=np.float32), np.array([0, 0]))
    grid = LinearGrid(data, 2, 2)
    grid.heads[1].get_parameter("weight").data[:] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    correct, loss = score_heads(grid, data, batch_size=1)
    # The standardised features are (1, -1) and (-1, 1), so the logits are (2, -2) and (-2, 2).
    assert correct.tolist() == [[True, True], [True, False]]
    np.testing.assert_allclose(
        loss, [math.log(2), math.log(1 + math.exp(4)) / 2 + math.log(1 + math.exp(-4)) / 2], rtol=1e-5
    )
    grid.heads = grid.heads[1:]
    assert score_heads(grid, data, 1)[0].tolist() == [[True, False]]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return pretrain_on_tinted_shards(tmp_path_factory.mktemp("tinted"))


TASKS = {
    "linear": (evaluate_linear, LinearConfig(epochs=20, batch_size=16, holdout=0.25)),
    "attentive": (evaluate_attentive, AttentiveConfig(epochs=20, batch_size=16, holdout=0.25)),
}


@pytest.mark.parametrize("task", TASKS)
def test_an_evaluation_predicts_visible_labels_beside_control_and_chance(run_folder, task):
    evaluate, config = TASKS[task]
    tint, cls = (evaluate(replace(config, run=str(run_folder), data=data)) for data in (TINT, EvalDataConfig()))
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
        assert row.num_tuned == sum(parameter.numel() for parameter in AttentiveHead(32, 3).parameters())
    saved = read_result(run_folder / "evaluations" / f"{task}_json.look.tint.json")
    assert saved.rows == tint.rows and saved.step == 3


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_result_from_cached_features(run_folder, task, caplog):
    evaluate, config = TASKS[task]
    config = replace(config, run=str(run_folder), seed=5)
    first = evaluate(config)
    caplog.set_level("INFO")
    second = evaluate(config)
    assert first.details == second.details
    assert [replace(row, time_s=None, images_per_s=None) for row in first.rows] == [
        replace(row, time_s=None, images_per_s=None) for row in second.rows
    ]
    assert "images at step" not in caplog.text


def test_the_control_is_the_same_probe_on_the_untrained_encoder(run_folder):
    config = replace(TASKS["linear"][1], run=str(run_folder))
    result = evaluate_linear(config)
    assert result.details["control_held_out"] != result.details["held_out"]
    other = evaluate_linear(replace(config, seed=1))
    assert other.details["control_held_out"] != result.details["control_held_out"]


def test_an_export_gives_the_result_of_its_run(run_folder, tmp_path):
    folder = export(ExportConfig(run=str(run_folder), to=str(tmp_path / "export")))
    config = replace(TASKS["linear"][1], run=str(run_folder))
    with pytest.raises(ValueError, match=r"data\.train must name the training shards"):
        evaluate_linear(replace(config, run=str(folder)))
    data = EvalDataConfig(train=str(run_folder.parent / "train.tar"), val=str(run_folder.parent / "val.tar"))
    exported = evaluate_linear(replace(config, run=str(folder), data=data)).row("encoder", "accuracy")
    original = evaluate_linear(config).row("encoder", "accuracy")
    assert (exported.value, exported.num_tuned) == (original.value, original.num_tuned)
    assert len(list((folder / "features").glob("*/rows.npy"))) == 4
    assert iwm_fast.load(folder).step == 3, "the cache damaged the export"


@pytest.mark.parametrize("task", TASKS)
def test_unusable_data_is_refused_with_address_and_remedy(run_folder, tmp_path, task):
    evaluate, config = TASKS[task]
    config = replace(config, run=str(run_folder))
    train = write_tinted_shard(tmp_path / "cut.tar", 6, 0, bad=2)
    wrong = {
        r"train\.tar: sample '000': its \.json has no field 'animal'": {"data": EvalDataConfig(label="json.animal")},
        r"val\.tar: sample '098': json\.name is integer 98, which is not one": {
            "data": EvalDataConfig(label="json.name")
        },
        r"cut\.tar:002 is truncated": {"data": EvalDataConfig(train=train)},
    }
    for message, change in wrong.items():
        with pytest.raises(ShardError, match=message):
            evaluate(replace(config, **change))
    with pytest.raises(ValueError, match=r"holdout must leave images .* of 2; raise max_train_samples or .* got 0\.01"):
        evaluate(replace(config, holdout=0.01, max_train_samples=2))


def test_tokens_that_exceed_max_cache_gb_are_refused_with_their_size(run_folder):
    config = replace(TASKS["attentive"][1], run=str(run_folder), max_cache_gb=1e-6)
    size = 2 * 60 * 16 * 32 * 2 / 1e9
    with pytest.raises(ValueError, match=rf"max_cache_gb must be at least {size:.4g}.*lower max_train_samples"):
        evaluate_attentive(config)


def test_too_few_held_out_images_and_an_edge_of_the_grid_are_logged(run_folder, caplog):
    caplog.set_level("INFO")
    config = replace(TASKS["linear"][1], run=str(run_folder), data=TINT, max_train_samples=4, lrs=(0.1, 0.01))
    evaluate_linear(config)
    assert "only 1 images choose hyperparameters for 3 classes; raise holdout" in caplog.text
    assert "is at the edge of the grid" in caplog.text


@pytest.mark.gpu
def test_a_gpu_gives_the_accuracy_of_the_cpu(run_folder):
    for evaluate, config in TASKS.values():
        rows = [
            evaluate(replace(config, run=str(run_folder), data=TINT, device=device)).row("encoder", "accuracy")
            for device in ("cpu", "cuda")
        ]
        assert [row.value for row in rows] == [1.0, 1.0]
    files = sorted((run_folder / "features").glob("*/rows.npy"), key=lambda path: path.stat().st_size)
    assert len(files) == 16, "features are not separate for each device"
