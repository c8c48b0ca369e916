"""Candidate banks: queries, candidates, and the ranks of correct answers."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fixtures.exact_predictor import FLAGS, JITTER
from iwm_fast.evals.retrieval.bank import (
    Query,
    bank_views,
    diagonal_ranks,
    draw_bank,
    encode_bank,
    make_query,
    max_sequences_per_forward,
    mean_squared_distances,
    read_out,
)
from iwm_fast.evals.retrieval.mrr import chance_mrr
from iwm_fast.pipelines.config import IMAGENET
from iwm_fast.pipelines.transforms.action import change_from_action
from iwm_fast.pipelines.transforms.composition import ViewConfig, identity_parameters
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.pipelines.transforms.torch_renderer import render


def bank_of(model, pixels, *, size=8, sample=0, seed=0):
    return draw_bank(pixels, sample, size, model=model, strengths="default", seed=seed)


def test_a_correct_answer_ranks_first_if_nearest_and_last_if_farthest():
    distance = torch.tensor([[0.0, 1.0, 2.0], [3.0, 9.0, 1.0], [1.0, 2.0, 1.5]])
    assert diagonal_ranks(distance).tolist() == [1, 3, 2]
    assert diagonal_ranks(distance[:2]).tolist() == [1, 3]


def test_ties_get_their_mean_rank():
    assert diagonal_ranks(torch.ones(5, 5)).tolist() == [3] * 5


def test_distances_are_accurate_though_tokens_share_a_large_offset():
    predicted, target = torch.randn(3, 40) + 1000, torch.randn(5, 40) + 1000
    loop = torch.stack([((row - target) ** 2).mean(dim=1) for row in predicted])
    torch.testing.assert_close(mean_squared_distances(predicted, target), loop, rtol=1e-4, atol=1e-4)


def test_a_bank_is_a_pure_function_of_seed_and_sample(model, pixels):
    bank, again = bank_of(model, pixels, sample=3), bank_of(model, pixels, sample=3)
    assert torch.equal(bank.pixels, again.pixels) and np.array_equal(bank.parameters["hue"], again.parameters["hue"])
    for changed in ({"sample": 4}, {"sample": 3, "seed": 1}):
        assert not torch.equal(bank.pixels, bank_of(model, pixels, **changed).pixels)
    assert torch.equal(bank_of(model, pixels, size=3, sample=3).pixels, bank.pixels[:3])


def test_all_candidates_of_a_bank_differ(model, pixels):
    assert len({candidate.numpy().tobytes() for candidate in bank_of(model, pixels, size=64).pixels}) == 64


def test_bank_strengths_are_the_defaults_strong_or_those_of_the_run(tiny_config):
    views = replace(tiny_config().views, jitter=replace(tiny_config().views.jitter, brightness=0.8))
    assert bank_views(views, "default").jitter.brightness == 0.4 and bank_views(views, "run").jitter.brightness == 0.8
    assert bank_views(views, "run").jitter.probability == 1.0
    strong = bank_views(ViewConfig(), "strong").jitter
    assert [getattr(strong, name) for name in JITTER] == [0.8, 0.8, 0.8, 0.2] and strong.probability == 1.0


def test_a_jitter_query_has_the_clean_image_and_the_changes_from_it(model, pixels):
    bank = bank_of(model, pixels)
    query = make_query(pixels, bank, "jitter", model)
    assert torch.equal(query.source, pixels)
    change = change_from_action(query.action.numpy(), model.config.views)
    for name in ("brightness", "contrast", "saturation"):
        np.testing.assert_allclose(np.exp(change[name]), bank.parameters[name], rtol=1e-6)
    np.testing.assert_allclose(change["hue"], bank.parameters["hue"], atol=1e-6)
    assert not any(change[name].any() for name in FLAGS)


@pytest.mark.parametrize("family", FLAGS)
def test_other_queries_have_the_destroyed_image_and_its_flag(model, pixels, family):
    bank, views = bank_of(model, pixels), model.config.views
    clean, destroyed = (make_query(pixels, bank, name, model) for name in ("jitter", family))
    # The middle of the run's range (0.1, 1.0).
    destruction = {"blur_sigma": np.array([0.55], np.float32), family: np.array([True])}
    assert torch.equal(destroyed.source, render(pixels[None], identity_parameters(views, 1) | destruction, views)[0])
    assert not torch.equal(destroyed.source, pixels)
    is_flag = torch.tensor([name == family for name in views.entries])
    assert torch.equal(destroyed.action[:, ~is_flag], clean.action[:, ~is_flag])
    assert (destroyed.action[:, is_flag] == 1).all()


def test_exact_predictions_rank_first_and_constant_ones_at_chance(model, pixels):
    target = encode_bank(model, bank_of(model, pixels, size=32))
    assert (diagonal_ranks(mean_squared_distances(target, target)) == 1).all()
    constant = target.mean(dim=0, keepdim=True).expand_as(target)
    assert float((1 / diagonal_ranks(mean_squared_distances(constant, target))).mean()) == pytest.approx(
        chance_mrr(32), abs=1e-6
    )


def test_a_prediction_uses_all_patches_and_its_own_action(model, pixels):
    action = torch.zeros(2, 7)
    action[1, 0] = 1.0
    predicted = next(read_out(model, Query(source=pixels, action=action)))
    assert predicted.shape == (2, 16 * 16) and not torch.allclose(predicted[0], predicted[1])
    expected = model.predict(normalize_view(pixels[None], IMAGENET), action[:1]).flatten(1)[0]
    torch.testing.assert_close(expected, predicted[0])


def test_predictions_that_exceed_one_forward_are_split_into_chunks(model, pixels, monkeypatch):
    query = make_query(pixels, bank_of(model, pixels), "jitter", model)
    in_one_forward = next(read_out(model, query))
    max_sequences = max_sequences_per_forward(model)
    monkeypatch.setattr("iwm_fast.evals.retrieval.bank._MAX_ATTENTION_SCORES", 3 * 2 * (2 * 16 + 7) ** 2)
    assert max_sequences_per_forward(model) == 3 < max_sequences
    torch.testing.assert_close(next(read_out(model, query)), in_one_forward)


def test_the_source_of_a_query_is_encoded_once_for_all_readouts(model, pixels):
    calls = []
    model.encoder.register_forward_hook(lambda *_: calls.append(1))
    assert len(list(read_out(model, make_query(pixels, bank_of(model, pixels), "jitter", model)))) == 2
    assert len(calls) == 1
