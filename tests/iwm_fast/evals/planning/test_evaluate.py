"""Planning: the search finds what a predictor knows, and the numbers beside it are what they say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from fixtures.exact_predictor import Pair, deaf, exact
from fixtures.tar_files import encode, photograph, write_tar
from fixtures.tiny_pretraining import tiny_run
from iwm_fast import world_model
from iwm_fast.config.evaluation import EvalData, PlanConfig
from iwm_fast.evals.datasets import batches, spread
from iwm_fast.evals.planning.cem import distance_to, search, searched_entries, training_prior
from iwm_fast.evals.planning.evaluate import Plan, evaluate_plan, measure, plan_images
from iwm_fast.evals.planning.image_pairs import draw_change, draw_tasks
from iwm_fast.evals.planning.report import Outcome, parameter_rows
from iwm_fast.evals.results import read_result
from iwm_fast.pipelines.config import ViewConfig
from iwm_fast.pipelines.counter_rng import uniforms
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.action import action_difference, action_vector
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.pipelines.transforms.parameters import JITTER, draw_photometry
from iwm_fast.pipelines.transforms.torch_renderer import render
from iwm_fast.runtime.distributed import single_process
from iwm_fast.train import run


@pytest.fixture
def model(tiny_config):
    config = tiny_config()
    return world_model.untrained(replace(config, runtime=replace(config.runtime, loader="torch")))


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
    """Predicts tokens that are a linear function of the action, and so tell it exactly."""

    def __init__(self, num_actions: int, num_tokens: int, dim: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(num_actions, num_tokens * dim, generator=generator)
        self.dim = dim

    def forward(self, context_tokens, action, context, target):
        return (action @ self.weight).view(-1, self.dim)


def test_the_search_finds_the_action_that_the_tokens_tell(model):
    model = replace(model, predictor=Linear(7, 16, 16))
    tokens = torch.zeros(1, 16, 16)
    done = np.array([1.3, -0.4, 0.9, -1.7, 0, 1, 1], np.float32)
    wanted = model.predict_from(tokens, torch.from_numpy(done[None]))

    def distance(action):
        predicted = model.predict_from(tokens.expand(len(action), -1, -1), torch.from_numpy(action))
        return (predicted - wanted).square().mean((1, 2)).double().numpy()

    found = search(distance, training_prior(model.config.views), small(population=256, rounds=25), 0)
    np.testing.assert_allclose(found.action, done, atol=1e-3)
    assert found.distance == pytest.approx(0, abs=1e-5)


def test_a_search_is_a_pure_function_of_seed_and_sample_and_more_of_it_comes_nearer(model):
    view = torch.randn(2, 1, 3, 16, 16)
    prior, distance = training_prior(model.config.views), distance_to(model, *view)

    def found(sample=0, **more):
        return search(distance, prior, small(**more), sample)

    first = found()
    assert np.array_equal(first.action, found().action)
    for other in (found(sample=1), found(seed=1)):
        assert not np.array_equal(first.action, other.action)
    assert found(rounds=8).distance < first.distance
    assert distance(first.action[None]) == pytest.approx([first.distance])


def test_what_is_tried_is_what_training_could_show(model):
    views = replace(model.config.views, hue=0.0, grayscale_probability=0.0)
    tried = []

    def distance(action):
        tried.append(action)
        return -action[:, 0].astype(np.float64)

    found = search(distance, training_prior(views), small(population=200, rounds=6), 0)
    actions = dict(zip(views.entries, np.concatenate(tried).T, strict=True))
    assert found.action[0] == 2.0  # brightness: from one end of the range to the other
    assert all(np.abs(actions[name]).max() <= 2 for name in JITTER)
    assert not actions["hue"].any() and not actions["grayscale"].any()
    assert set(actions["blur"]) == set(actions["solarize"]) == {0.0, 1.0}


def test_the_search_begins_with_the_spread_of_trainings_own_actions():
    views, slots = ViewConfig(brightness=0.8, jitter_probability=0.6), np.arange(20_000)
    source, target = (
        draw_photometry(views, uniforms(0, name, 0, slots, 9), is_source=name == "a") for name in ("a", "b")
    )
    drawn, prior = action_vector(source, target, views), training_prior(views)
    np.testing.assert_allclose(drawn.std(axis=0)[:4], prior.std[:4], rtol=0.02)
    np.testing.assert_allclose(drawn.mean(axis=0), prior.mean, atol=0.02)
    assert (np.abs(drawn) <= prior.limit + 1e-5).all()


def pairs_of(model, shards, samples, kind, config):
    """Return sources, clean images and flags of the validation tasks, as an exact predictor wants them."""
    tasks = list(draw_tasks(model, shards, samples, kind=kind, split="val", seed=config.seed))
    (batch,) = batches(model, shards, samples)
    flags = [action_difference(task.action[None], model.config.views) for task in tasks]
    return [
        Pair(
            source=denormalize_view(task.source)[0],
            clean=clean,
            flags=tuple(name for name in ("grayscale", "blur", "solarize") if flag[name][0] > 0.5),
        )
        for task, clean, flag in zip(tasks, denormalize_view(batch.source_view), flags, strict=True)
    ]


@pytest.mark.parametrize("kind", ["clean", "destroyed"])
def test_through_the_exact_predictor_the_change_of_real_images_is_recovered(model, tiny_shards, kind):
    shards, config = open_shards(tiny_shards.pattern), small(population=128, rounds=8)
    samples = spread(shards.num_samples, 3)
    perfect = exact(model, *pairs_of(model, shards, samples, kind, config))
    outcome = measure(perfect, shards, shards, kind, config, rank_info=single_process("cpu"))
    brightness, *_ = parameter_rows(outcome, JITTER, model.config, 0)
    assert brightness.value < 0.03 < brightness.chance / 4
    assert outcome.done[:, 4:].any() == (kind == "destroyed")
    np.testing.assert_array_equal(outcome.found[:, 4:], outcome.done[:, 4:])
    # the true action is exact to the rounding of pixels, and doing nothing is worse than what was found
    assert (outcome.distance[:, 1] < 1e-3).all() and (outcome.distance[:, 2] > 10 * outcome.distance[:, 0]).all()


def test_through_a_deaf_predictor_errors_are_those_of_a_guess(model, tiny_shards):
    shards, config = open_shards(tiny_shards.pattern), small(num_images=48)
    outcome = measure(deaf(model), shards, shards, "clean", config, rank_info=single_process("cpu"))
    for row in parameter_rows(outcome, JITTER, model.config, 0):
        if row.metric == "error":
            assert row.value > 0.8 * row.chance


def test_rows_say_what_is_missed_in_natural_units_and_what_is_to_be_beaten(folder):
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


def test_a_guess_and_doing_nothing_miss_by_what_many_guesses_miss_by():
    config = world_config(brightness=0.5)
    done = np.zeros((400, 7), np.float32)
    done[:, 0] = np.linspace(-1, 1, 400)
    outcome = blank(done)
    rows = {row.metric: row for row in parameter_rows(outcome, ["brightness"], config, 0)}
    guesses = np.random.default_rng(0).uniform(-0.5, 0.5, (400, 2000))
    assert rows["error"].chance == pytest.approx(np.abs(guesses - 0.5 * done[:, :1]).mean(), rel=0.01)
    assert rows["error_of_no_change"].value == pytest.approx(0.25, rel=0.01) and rows["error"].value == 0


def world_config(**views):
    from iwm_fast.config.run import RunConfig

    return RunConfig(views=ViewConfig(**views))


def blank(done, has_colour=None):
    has_colour = np.ones(len(done), np.float32) if has_colour is None else has_colour
    distance = np.zeros((len(done), 3), np.float32)
    return Outcome(done=done, found=done, untrained=done, regressed=done, distance=distance, has_colour=has_colour)


def test_where_some_photographs_have_no_colour_saturation_and_hue_are_told_without_them_too():
    done = np.ones((4, 7), np.float32)
    found = done.copy()
    found[:2, 2:4] += 1  # one strength off where nothing is to be seen
    outcome = replace(blank(done, np.array([0, 0, 1, 1], np.float32)), found=found)
    rows = {(row.subject, row.metric): row for row in parameter_rows(outcome, JITTER, world_config(), 0)}
    assert rows["photographs", "share_without_colour"].value == 0.5
    for name, strength in (("saturation", 0.2), ("hue", 0.1)):
        assert rows[name, "error"].value == pytest.approx(strength / 2)
        assert rows[name, "error_with_colour"].value == 0 and rows[name, "error_with_colour"].num_samples == 2
    assert ("brightness", "error_with_colour") not in rows


def test_a_photograph_without_colour_is_known_as_one(model, tmp_path):
    coffee = photograph("coffee.png")[:40, :40]
    grey = np.repeat(coffee.mean(axis=2, keepdims=True), 3, axis=2).astype(np.uint8)
    write_tar(tmp_path / "a.tar", [("0.png", encode(coffee, "PNG")), ("1.png", encode(grey, "PNG"))])
    tasks = draw_tasks(model, open_shards(str(tmp_path / "a.tar")), np.arange(2), kind="clean", split="val", seed=0)
    assert [task.has_colour for task in tasks] == [True, False]


def test_tasks_are_drawn_as_they_are_told_and_differ_between_splits_seeds_and_images(tiny_config):
    views = replace(tiny_config().views, blur_probability=0.0)
    changes = [draw_change(views, sample, kind="destroyed", split="val", seed=0) for sample in range(200)]
    sources = [source for source, _ in changes]
    assert not any(source.blur[0] for source in sources)
    assert 70 < sum(source.grayscale[0] for source in sources) < 130
    assert all(source.brightness[0] == 1 and source.hue[0] == 0 for source in sources)
    assert len({float(target.brightness[0]) for _, target in changes}) == 200
    assert not any(flag[0] for _, target in changes for flag in (target.grayscale, target.blur, target.solarize))
    clean, _ = draw_change(views, 0, kind="clean", split="val", seed=0)
    assert not clean.grayscale[0] and not clean.solarize[0]
    for other in ({"split": "train", "seed": 0}, {"split": "val", "seed": 1}):
        _, target = draw_change(views, 0, kind="destroyed", **other)
        assert target.brightness[0] != changes[0][1].brightness[0]


def test_only_what_training_varied_and_the_action_tells_is_searched_for():
    assert searched_entries(ViewConfig()) == ViewConfig().entries
    views = ViewConfig(hue=0.0, blur_probability=0.0, source_crop=(0.5, 1.0))
    assert searched_entries(views) == ("brightness", "contrast", "saturation", "grayscale", "solarize")
    with pytest.raises(ValueError, match=r"run must have actions with an entry to search for: brightness"):
        training_prior(ViewConfig(source_crop=(0.5, 1.0), action_entries=("crop_x",)))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    """Return a photograph, and the same half as bright, as files of another shape than the views."""
    folder, pixels = tmp_path_factory.mktemp("files"), torch.from_numpy(photograph("coffee.png")[:90, :120].copy())
    source, target = draw_change(ViewConfig(), 0, kind="clean", split="val", seed=0)
    darker = render(pixels[None], replace(target, **{name: getattr(source, name) for name in JITTER[1:]}))[0]
    for name, image in (("source.jpg", pixels), ("target.png", darker)):
        (folder / name).write_bytes(encode(image.numpy(), "PNG" if name.endswith("png") else "JPEG"))
    return str(folder / "source.jpg"), str(folder / "target.png")


def test_the_change_between_two_image_files_is_said_in_natural_units(folder, files):
    source, target = files
    settings = small(folder, source=source, target=target, population=64, rounds=6)
    plan = plan_images(settings)
    assert plan == plan_images(settings) and isinstance(plan, Plan)
    model = world_model.load(folder)
    assert tuple(plan.change) == model.config.views.entries
    view, wanted = model.load_image(source), model.encode_targets(model.load_image(target))

    def distance(action):
        return float((model.predict(view, action) - wanted).square().mean())

    assert plan.distance_before == pytest.approx(distance(model.action()), rel=1e-4)
    assert plan.distance_after == pytest.approx(distance(model.action(**plan.change)), rel=1e-4)
    assert plan.distance_after < plan.distance_before and "brightness" in plan.words
    assert str(plan).startswith(plan.words) and f"{plan.distance_after:.4f} for this" in str(plan)


def test_files_that_are_missing_or_no_images_are_refused_by_name(folder, files, tmp_path):
    (tmp_path / "note.jpg").write_text("not an image")
    with pytest.raises(ValueError, match=r"note\.jpg must be a complete image of a supported format"):
        plan_images(small(folder, source=files[0], target=str(tmp_path / "note.jpg")))
    with pytest.raises(FileNotFoundError, match=r"absent\.jpg"):
        plan_images(small(folder, source=str(tmp_path / "absent.jpg"), target=files[1]))
    with pytest.raises(ValueError, match="source and target must both name image files"):
        small(folder, source=files[0])
    with pytest.raises(ValueError, match="source and target must both name image files"):
        plan_images(small(folder))


def test_a_run_without_a_world_model_is_refused_at_once(tiny_shards, tmp_path):
    run(tiny_run(tiny_shards, tmp_path / "run", loader="torch", depth=0))
    with pytest.raises(ValueError, match=r"run must have a predictor, not the identity"):
        evaluate_plan(small(str(tmp_path / "run"), data=EvalData(val="/absent.tar")))
