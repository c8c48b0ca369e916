"""Planning: the search recovers changes through exact predictors, and the rows have correct baselines."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fixtures.exact_predictor import JITTER, Pair, exact, ignore_action
from fixtures.tar_files import encode, photograph, write_tar
from fixtures.tiny_pretraining import tiny_run
from iwm_fast import world_model
from iwm_fast.config.evaluation import EvalDataConfig, PlanConfig
from iwm_fast.evals.datasets import evaluation_batches, evenly_spaced
from iwm_fast.evals.planning.cem import distance_to, search, searched_entries, training_prior
from iwm_fast.evals.planning.evaluate import PlannedChange, evaluate_plan, measure, plan_images
from iwm_fast.evals.planning.image_pairs import draw_change, draw_pairs
from iwm_fast.evals.planning.report import PlanningErrors, parameter_rows, recovery_plots
from iwm_fast.evals.results import read_result
from iwm_fast.pipelines.config import IMAGENET
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.action import action_vector, change_from_action
from iwm_fast.pipelines.transforms.composition import ViewConfig, draw_view
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.pipelines.transforms.operations.blur import Blur
from iwm_fast.pipelines.transforms.operations.crop import Crop
from iwm_fast.pipelines.transforms.operations.gamma import Gamma
from iwm_fast.pipelines.transforms.operations.jitter import Jitter
from iwm_fast.pipelines.transforms.operations.rotation import Rotation
from iwm_fast.pipelines.transforms.torch_renderer import render
from iwm_fast.runtime.distributed import single_process
from iwm_fast.train import run


@pytest.fixture
def model(tiny_config):
    config = tiny_config()
    return world_model.build_untrained(replace(config, runtime=replace(config.runtime, loader="torch")))


@pytest.fixture(scope="module")
def folder(tiny_shards, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("plan") / "run"
    config = tiny_run(tiny_shards, folder, loader="torch")
    optim = replace(config.optim, epochs=1.0, warmup_epochs=0.0)
    run(replace(config, data=replace(config.data, val=tiny_shards.pattern), optim=optim))
    return str(folder)


def small(folder="x", **more):
    values = {"run": folder, "num_images": 3, "num_train_images": 20, "population": 16, "rounds": 2, "device": "cpu"}
    return PlanConfig(**(values | more))


class Linear(nn.Module):
    """Predicts tokens that are an invertible linear function of the action."""

    def __init__(self, num_actions: int, num_tokens: int, dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(num_actions, num_tokens * dim, generator=generator)
        self.dim = dim

    def forward(self, context_tokens, action, context, target):
        return (action @ self.weight).view(-1, self.dim)


def test_the_search_finds_the_action_that_produced_the_target_tokens(model):
    model = replace(model, predictor=Linear(7, 16, 16))
    tokens = torch.zeros(1, 16, 16)
    true = np.array([1.3, -0.4, 0.9, -1.7, 0, 1, 1], np.float32)
    target_tokens = model.predict_from(tokens, torch.from_numpy(true[None]))

    def distance(action):
        predicted = model.predict_from(tokens.expand(len(action), -1, -1), torch.from_numpy(action))
        return (predicted - target_tokens).square().mean((1, 2)).double().numpy()

    result = search(distance, training_prior(model.config.views), small(population=256, rounds=25), 0)
    np.testing.assert_allclose(result.action, true, atol=1e-3)
    assert result.distance == pytest.approx(0, abs=1e-5)


def test_a_search_depends_on_seed_and_sample_and_improves_with_rounds(model):
    view = torch.randn(2, 1, 3, 16, 16)
    prior, distance = training_prior(model.config.views), distance_to(model, *view, "absolute")

    def run_search(sample=0, **settings):
        return search(distance, prior, small(**settings), sample)

    first = run_search()
    assert np.array_equal(first.action, run_search().action)
    for other in (run_search(sample=1), run_search(seed=1)):
        assert not np.array_equal(first.action, other.action)
    assert run_search(rounds=8).distance < first.distance
    assert distance(first.action[None]) == pytest.approx([first.distance])


def test_candidates_are_actions_that_training_could_show(model):
    views = replace(
        model.config.views,
        jitter=replace(model.config.views.jitter, hue=0.0),
        grayscale=replace(model.config.views.grayscale, probability=0.0),
    )
    candidates = []

    def distance(actions):
        candidates.append(actions)
        return -actions[:, 0].astype(np.float64)

    result = search(distance, training_prior(views), small(population=200, rounds=6), 0)
    actions = dict(zip(views.entries, np.concatenate(candidates).T, strict=True))
    # Brightness from one end of its range to the other.
    assert result.action[0] == 2.0
    assert all(np.abs(actions[name]).max() <= 2 for name in JITTER)
    assert not actions["hue"].any() and not actions["grayscale"].any()
    assert set(actions["blur"]) == set(actions["solarize"]) == {0.0, 1.0}


def test_the_search_starts_with_mean_and_spread_of_training_actions():
    views, slots = ViewConfig(jitter=Jitter(brightness=0.8, probability=0.6)), np.arange(20_000)
    source, target = (draw_view(views, 0, name, 0, slots, is_source=name == "a") for name in ("a", "b"))
    drawn, prior = action_vector(source, target, views), training_prior(views)
    np.testing.assert_allclose(drawn.std(axis=0)[:4], prior.std[:4], rtol=0.02)
    np.testing.assert_allclose(drawn.mean(axis=0), prior.mean, atol=0.02)
    assert (np.abs(drawn) <= prior.limit + 1e-5).all()


def pairs_of(model, shards, samples, kind, config):
    """Return the validation pairs in the form that the exact predictor takes."""
    pairs = list(draw_pairs(model, shards, samples, kind=kind, split="val", seed=config.seed))
    (batch,) = evaluation_batches(model, shards, samples)
    flags = [change_from_action(pair.action[None], model.config.views) for pair in pairs]
    return [
        Pair(
            source=denormalize_view(pair.source, IMAGENET)[0],
            clean=clean,
            flags=tuple(name for name in ("grayscale", "blur", "solarize") if flag[name][0] > 0.5),
        )
        for pair, clean, flag in zip(pairs, denormalize_view(batch.source_view, IMAGENET), flags, strict=True)
    ]


@pytest.mark.parametrize("kind", ["clean", "destroyed"])
def test_an_exact_predictor_recovers_the_changes_of_real_images(model, tiny_shards, kind):
    shards, config = open_shards(tiny_shards.pattern), small(population=128, rounds=8)
    samples = evenly_spaced(shards.num_samples, 3)
    exact_model = exact(model, *pairs_of(model, shards, samples, kind, config))
    errors = measure(exact_model, shards, shards, kind, config, rank_info=single_process("cpu"))
    brightness, *_ = parameter_rows(errors, JITTER, model.config, 0)
    assert brightness.value < 0.03 < brightness.chance / 4
    assert errors.true[:, 4:].any() == (kind == "destroyed")
    np.testing.assert_array_equal(errors.searched[:, 4:], errors.true[:, 4:])
    # The true action is exact up to the rounding of pixels, and no change is far worse than the searched action.
    assert (errors.distance[:, 1] < 1e-3).all() and (errors.distance[:, 2] > 10 * errors.distance[:, 0]).all()


def test_numbers_of_other_transformations_are_searched_too(tiny_config, tiny_shards):
    views = replace(tiny_config().views, gamma=Gamma(probability=0.5), rotation=Rotation(probability=0.5))
    config = replace(tiny_config(), views=views)
    model = world_model.build_untrained(replace(config, runtime=replace(config.runtime, loader="torch")))
    source, target = draw_change(views, 0, kind="clean", split="val", seed=0)
    assert source["rotation"] == 0 != target["rotation"] and source["rotation_side"] == target["rotation_side"] < 1
    shards, settings = open_shards(tiny_shards.pattern), small(population=64, rounds=4)
    (pair,) = pairs_of(model, shards, np.array([0]), "clean", settings)
    unchanged = views.rotation.query_source(1)
    known = replace(pair, unchanged=unchanged)
    (drawn,) = draw_pairs(model, shards, np.array([0]), kind="clean", split="val", seed=0)
    distance = distance_to(exact(model, known), drawn.source, drawn.target, "absolute")
    columns = [views.entries.index(name) for name in ("gamma", "rotation")]
    without = [np.where(np.arange(len(drawn.action)) == column, 0, drawn.action) for column in columns]
    exactly, *others = distance(np.stack([drawn.action, *without]).astype(np.float32))
    assert exactly < 1e-3 and min(others) > 10 * exactly
    found = search(distance, training_prior(views), settings, 0)
    assert found.distance < max(others) / 10 and all(found.action[columns] != 0)


def test_a_predictor_that_ignores_the_action_has_the_errors_of_a_guess(model, tiny_shards):
    shards, config = open_shards(tiny_shards.pattern), small(num_images=48)
    errors = measure(ignore_action(model), shards, shards, "clean", config, rank_info=single_process("cpu"))
    for row in parameter_rows(errors, JITTER, model.config, 0):
        if row.metric == "error":
            assert row.value > 0.8 * row.chance


def test_rows_have_the_errors_of_search_baselines_and_chance(folder):
    result = evaluate_plan(small(folder))
    assert read_result(Path(folder) / "evaluations" / "plan.json").rows == result.rows
    by_name = {(row.subject, row.metric): row for row in result.rows}
    for name in JITTER:
        row = by_name[name, "error"]
        assert row.low <= row.value <= row.high and row.num_samples == 3 and row.control_name == "untrained predictor"
        assert by_name[name, "error_of_regression"].num_tuned == 3 * 32 + 1
        assert by_name[name, "error_of_no_change"].value < row.chance
    for name in ("grayscale", "blur", "solarize"):
        assert by_name[name, "wrong"].chance == 0.5 and by_name[name, "wrong"].value in (0, 1 / 3, 2 / 3, 1)
        assert {(name, "wrong_of_regression"), (name, "wrong_of_no_change")} <= set(by_name)
    for kind in ("clean", "destroyed"):
        assert {f"{kind} sources"} == {row.subject for row in result.rows if row.subject.startswith(kind)}
    assert by_name["photographs", "share_without_colour"].value == 0


def test_the_difference_readout_has_a_result_of_its_own_and_starts_from_the_source(folder):
    result = evaluate_plan(small(folder, readout="difference"))
    assert result.name == "plan_difference"
    assert (Path(folder) / "evaluations" / "plan_difference.png").is_file()
    model = world_model.load(folder)
    shards = open_shards(model.config.data.val)
    samples = evenly_spaced(shards.num_samples, 3)
    pairs = draw_pairs(model, shards, samples, kind="clean", split="val", seed=0)
    own = [(model.encode_targets(pair.source) - model.encode_targets(pair.target)).square().mean() for pair in pairs]
    assert result.value("clean sources", "distance_of_no_change") == pytest.approx(np.mean(own), rel=1e-4)


@pytest.mark.parametrize("encoding", ["difference", "log_ratio"])
def test_chance_is_the_mean_error_of_many_guesses(encoding):
    config = world_config(jitter=Jitter(brightness=0.5, encoding=encoding))
    scale = config.views.all_entries["brightness"].scale
    true = np.zeros((400, 7), np.float32)
    true[:, 0] = np.linspace(-1, 1, 400)
    errors = errors_of_true_actions(true)
    rows = {row.metric: row for row in parameter_rows(errors, ["brightness"], config, 0)}
    guesses = np.random.default_rng(0).uniform(-0.5, 0.5, (400, 2000))
    guesses = np.log1p(guesses) if encoding == "log_ratio" else guesses
    assert rows["error"].chance == pytest.approx(np.abs(guesses - scale * true[:, :1]).mean(), rel=0.01)
    assert rows["error_of_no_change"].value == pytest.approx(scale / 2, rel=0.01) and rows["error"].value == 0


def world_config(**views):
    from iwm_fast.config.run import RunConfig

    return RunConfig(views=ViewConfig(**views))


def errors_of_true_actions(true, has_colour=None):
    """Return estimates that are all equal to the true actions."""
    has_colour = np.ones(len(true), np.float32) if has_colour is None else has_colour
    zeros = np.zeros((len(true), 3), np.float32)
    return PlanningErrors(
        true=true, searched=true, untrained=true, regressed=true, distance=zeros, has_colour=has_colour
    )


def test_saturation_and_hue_have_further_rows_for_coloured_photographs():
    true = np.ones((4, 7), np.float32)
    searched = true.copy()
    # One strength off in the photographs without colour.
    searched[:2, 2:4] += 1
    errors = replace(errors_of_true_actions(true, np.array([0, 0, 1, 1], np.float32)), searched=searched)
    config = world_config(jitter=Jitter(encoding="difference"))
    plots = {plot.title: plot for plot in recovery_plots(errors, (*JITTER, "blur"), config)}
    assert [len(plot.asked) for plot in plots.values()] == [4, 4, 2, 2]
    assert plots["Brightness"].recovered["search"].tolist() == plots["Brightness"].asked.tolist()
    assert plots["Hue"].note == "2 images; mean error: search 0.000; regression 0.000; no change 0.100"
    rows = {(row.subject, row.metric): row for row in parameter_rows(errors, JITTER, config, 0)}
    assert rows["photographs", "share_without_colour"].value == 0.5
    for name, strength in (("saturation", 0.2), ("hue", 0.1)):
        assert rows[name, "error"].value == pytest.approx(strength / 2)
        assert rows[name, "error_with_colour"].value == 0 and rows[name, "error_with_colour"].num_samples == 2
    assert ("brightness", "error_with_colour") not in rows


def test_a_photograph_without_colour_is_recognised(model, tmp_path):
    coffee = photograph("coffee.png")[:40, :40]
    grey = np.repeat(coffee.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    write_tar(tmp_path / "a.tar", [("0.png", encode(coffee, "PNG")), ("1.png", encode(grey, "PNG"))])
    pairs = draw_pairs(model, open_shards(str(tmp_path / "a.tar")), np.arange(2), kind="clean", split="val", seed=0)
    assert [pair.has_colour for pair in pairs] == [True, False]


def test_changes_depend_on_kind_split_seed_and_image(tiny_config):
    views = replace(tiny_config().views, blur=replace(tiny_config().views.blur, probability=0.0))
    changes = [draw_change(views, sample, kind="destroyed", split="val", seed=0) for sample in range(200)]
    sources = [source for source, _ in changes]
    assert not any(source["blur"][0] for source in sources)
    assert 70 < sum(source["grayscale"][0] for source in sources) < 130
    assert all(source["brightness"][0] == 1 and source["hue"][0] == 0 for source in sources)
    assert len({float(target["brightness"][0]) for _, target in changes}) == 200
    assert not any(
        flag[0] for _, target in changes for flag in (target["grayscale"], target["blur"], target["solarize"])
    )
    clean, _ = draw_change(views, 0, kind="clean", split="val", seed=0)
    assert not clean["grayscale"][0] and not clean["solarize"][0]
    for other in ({"split": "train", "seed": 0}, {"split": "val", "seed": 1}):
        _, target = draw_change(views, 0, kind="destroyed", **other)
        assert target["brightness"][0] != changes[0][1]["brightness"][0]


def test_only_entries_that_training_varies_are_searched():
    assert searched_entries(ViewConfig()) == ViewConfig().entries
    views = ViewConfig(jitter=Jitter(hue=0.0), blur=Blur(probability=0.0), crop=Crop(source_scale=(0.5, 1.0)))
    assert searched_entries(views) == ("brightness", "contrast", "saturation", "grayscale", "solarize")
    with pytest.raises(ValueError, match=r"run must have actions with an entry to search for: brightness"):
        training_prior(ViewConfig(crop=Crop(source_scale=(0.5, 1.0)), action_entries=("crop_x",)))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    """Return files of a photograph and of a version with changed brightness, both larger than the views."""
    folder, pixels = tmp_path_factory.mktemp("files"), torch.from_numpy(photograph("coffee.png")[:90, :120].copy())
    source, target = draw_change(ViewConfig(), 0, kind="clean", split="val", seed=0)
    changed = render(pixels[None], target | {name: source[name] for name in JITTER[1:]}, ViewConfig())[0]
    for name, image in (("source.jpg", pixels), ("target.png", changed)):
        (folder / name).write_bytes(encode(image.numpy(), "PNG" if name.endswith("png") else "JPEG"))
    return str(folder / "source.jpg"), str(folder / "target.png")


def test_the_change_between_two_image_files_is_in_natural_units(folder, files):
    source, target = files
    settings = small(folder, source=source, target=target, population=64, rounds=6)
    planned = plan_images(settings)
    assert planned == plan_images(settings) and isinstance(planned, PlannedChange)
    model = world_model.load(folder)
    assert tuple(planned.change) == model.config.views.entries
    view, target_tokens = model.load_image(source), model.encode_targets(model.load_image(target))

    def distance(action):
        return float((model.predict(view, action) - target_tokens).square().mean())

    assert planned.distance_before == pytest.approx(distance(model.action()), rel=1e-4)
    assert planned.distance_after == pytest.approx(distance(model.action(**planned.change)), rel=1e-4)
    assert planned.distance_after < planned.distance_before and "brightness" in planned.description
    text = str(planned)
    assert text.startswith(planned.description) and f"{planned.distance_after:.4f} for this change" in text


def test_files_that_are_missing_or_not_images_are_refused_by_name(folder, files, tmp_path):
    (tmp_path / "note.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"note\.jpg must be a complete image of a supported format"):
        plan_images(small(folder, source=files[0], target=str(tmp_path / "note.jpg")))
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        plan_images(small(folder, source=str(tmp_path / "absent.jpg"), target=files[1]))
    with pytest.raises(ValueError, match="source and target must both name image files"):
        small(folder, source=files[0])
    with pytest.raises(ValueError, match="source and target must both name image files"):
        plan_images(small(folder))


def test_a_run_with_the_identity_predictor_is_refused_immediately(tiny_shards, tmp_path):
    run(tiny_run(tiny_shards, tmp_path / "run", loader="torch", depth=0))
    with pytest.raises(ValueError, match=r"run must have a predictor, not the identity"):
        evaluate_plan(small(str(tmp_path / "run"), data=EvalDataConfig(val="/absent.tar")))
