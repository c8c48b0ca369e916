"""Banks: what is asked, what it is looked up in, and how ranks are counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fixtures.exact_predictor import FLAGS
from fixtures.tar_files import photograph
from iwm_fast import world_model
from iwm_fast.evals.retrieval.bank import (
    Question,
    ask,
    bank_views,
    distances,
    draw_bank,
    predicted_map,
    ranks,
    sequences_at_once,
    target_map,
)
from iwm_fast.evals.retrieval.mrr import chance
from iwm_fast.pipelines.config import ViewConfig
from iwm_fast.pipelines.transforms.action import action_difference
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.pipelines.transforms.parameters import JITTER, identity_photometry
from iwm_fast.pipelines.transforms.torch_renderer import render


@pytest.fixture
def model(tiny_config):
    return world_model.untrained(tiny_config())


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.from_numpy(photograph("coffee.png")[100:116, 100:116].copy())


def bank_of(model, pixels, *, size=8, sample=0, seed=0):
    return draw_bank(pixels, sample, size, model=model, strengths="default", seed=seed)


def test_the_right_answer_first_is_rank_one_and_last_is_the_bank():
    distance = torch.tensor([[0.0, 1.0, 2.0], [3.0, 9.0, 1.0], [1.0, 2.0, 1.5]])
    assert ranks(distance).tolist() == [1, 3, 2]
    assert ranks(distance[:2]).tolist() == [1, 3]


def test_ties_share_their_middle_rank():
    assert ranks(torch.ones(5, 5)).tolist() == [3] * 5


def test_distances_are_those_of_the_loop_though_tokens_share_a_large_offset():
    predicted, target = torch.randn(3, 40) + 1000, torch.randn(5, 40) + 1000
    loop = torch.stack([((row - target) ** 2).mean(dim=1) for row in predicted])
    torch.testing.assert_close(distances(predicted, target), loop, rtol=1e-4, atol=1e-4)


def test_a_bank_is_a_pure_function_of_seed_and_sample(model, pixels):
    bank, again = bank_of(model, pixels, sample=3), bank_of(model, pixels, sample=3)
    assert torch.equal(bank.pixels, again.pixels) and np.array_equal(bank.photometry.hue, again.photometry.hue)
    for other in ({"sample": 4}, {"sample": 3, "seed": 1}):
        assert not torch.equal(bank.pixels, bank_of(model, pixels, **other).pixels)
    assert torch.equal(bank_of(model, pixels, size=3, sample=3).pixels, bank.pixels[:3])


def test_no_two_members_of_a_bank_are_the_same_image(model, pixels):
    assert len({member.numpy().tobytes() for member in bank_of(model, pixels, size=64).pixels}) == 64


def test_bank_strengths_are_the_defaults_or_the_runs_own(tiny_config):
    views = replace(tiny_config().views, brightness=0.8)
    assert bank_views(views, "default").brightness == 0.4 and bank_views(views, "run").brightness == 0.8
    assert bank_views(views, "run").jitter_probability == 1.0
    strong = bank_views(ViewConfig(), "strong")
    assert [getattr(strong, name) for name in JITTER] == [0.8, 0.8, 0.8, 0.2] and strong.jitter_probability == 1.0


def test_jitter_is_asked_of_the_untouched_image_and_says_what_each_member_differs_by(model, pixels):
    bank = bank_of(model, pixels)
    question = ask(pixels, bank, "jitter", model)
    assert torch.equal(question.source, pixels)
    change = action_difference(question.action.numpy(), model.config.views)
    for name in JITTER:
        neutral = getattr(identity_photometry(1), name)[0]
        np.testing.assert_allclose(neutral + change[name], getattr(bank.photometry, name), atol=1e-6)
    assert not any(change[name].any() for name in FLAGS)


@pytest.mark.parametrize("family", FLAGS)
def test_other_families_ask_the_same_of_the_destroyed_image_and_name_the_destruction(model, pixels, family):
    bank = bank_of(model, pixels)
    forward, backward = (ask(pixels, bank, one, model) for one in ("jitter", family))
    # the middle of the run's range (0.1, 1.0)
    suffered = {"blur_sigma": np.array([0.55], np.float32), family: np.array([True])}
    assert torch.equal(backward.source, render(pixels[None], replace(identity_photometry(1), **suffered))[0])
    assert not torch.equal(backward.source, pixels)
    entries = model.config.views.entries
    is_flag = torch.tensor([name == family for name in entries])
    assert torch.equal(backward.action[:, ~is_flag], forward.action[:, ~is_flag])
    assert (backward.action[:, is_flag] == 1).all()


def test_knowing_the_answer_is_rank_one_and_guessing_is_chance(model, pixels):
    target = target_map(model, bank_of(model, pixels, size=32))
    assert (ranks(distances(target, target)) == 1).all()
    deaf = target.mean(dim=0, keepdim=True).expand_as(target)
    assert float((1 / ranks(distances(deaf, target))).mean()) == pytest.approx(chance(32), abs=1e-6)


def test_prediction_uses_the_whole_image_and_the_asked_action(model, pixels):
    action = torch.zeros(2, 7)
    action[1, 0] = 1.0
    predicted = predicted_map(model, Question(source=pixels, action=action))
    assert predicted.shape == (2, 16 * 16) and not torch.allclose(predicted[0], predicted[1])
    torch.testing.assert_close(model.predict(normalize_view(pixels[None]), action[:1]).flatten(1)[0], predicted[0])


def test_what_does_not_fit_into_one_forward_is_predicted_in_parts(model, pixels, monkeypatch):
    question = ask(pixels, bank_of(model, pixels), "jitter", model)
    whole = predicted_map(model, question)
    at_once = sequences_at_once(model)
    monkeypatch.setattr("iwm_fast.evals.retrieval.bank._MOST_SCORES", 3 * 2 * (2 * 16 + 7) ** 2)
    assert sequences_at_once(model) == 3 < at_once
    torch.testing.assert_close(predicted_map(model, question), whole)
