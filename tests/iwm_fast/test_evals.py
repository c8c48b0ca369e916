from dataclasses import replace

import pytest
import torch

from iwm_fast import world_model
from iwm_fast.evals.bank import Bank, bank_views, distances, draw_bank, predicted_map, ranks, target_map
from iwm_fast.evals.config import EvalData, ImagineConfig, MrrConfig
from iwm_fast.evals.mrr import bank_ranks, chance
from pipelines.batch import normalize_view
from pipelines.shards import open_shards
from samples import photograph


@pytest.fixture
def model(tiny_config):
    return world_model.untrained(tiny_config())


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.from_numpy(photograph("coffee.png")[100:116, 100:116].copy())


def test_the_right_answer_first_is_rank_one_and_last_is_the_bank():
    distance = torch.tensor([[0.0, 1.0, 2.0], [3.0, 9.0, 1.0], [1.0, 2.0, 1.5]])
    assert ranks(distance).tolist() == [1, 3, 2]


def test_ties_share_their_middle_rank():
    assert ranks(torch.ones(5, 5)).tolist() == [3] * 5


def test_chance_is_the_harmonic_number_over_the_bank():
    assert chance(64) == pytest.approx(0.0741, abs=1e-4) and chance(256) == pytest.approx(0.0239, abs=1e-4)


def test_distances_are_those_of_the_loop_though_tokens_share_a_large_offset():
    predicted, target = torch.randn(5, 40) + 1000, torch.randn(5, 40) + 1000
    loop = torch.stack([((row - target) ** 2).mean(dim=1) for row in predicted])
    torch.testing.assert_close(distances(predicted, target), loop, rtol=1e-4, atol=1e-4)


def test_a_bank_is_a_pure_function_of_seed_and_sample(model, pixels):
    bank = draw_bank(pixels, 3, 8, model=model, strengths="default", seed=0)
    again = draw_bank(pixels, 3, 8, model=model, strengths="default", seed=0)
    assert torch.equal(bank.pixels, again.pixels) and torch.equal(bank.action, again.action)
    for other in ({"sample": 4, "seed": 0}, {"sample": 3, "seed": 1}):
        changed = draw_bank(pixels, other["sample"], 8, model=model, strengths="default", seed=other["seed"])
        assert not torch.equal(bank.pixels, changed.pixels)


def test_no_two_members_of_a_bank_are_the_same_image(model, pixels):
    bank = draw_bank(pixels, 0, 64, model=model, strengths="default", seed=0)
    assert len({member.numpy().tobytes() for member in bank.pixels}) == 64


def test_bank_strengths_are_the_defaults_or_the_runs_own(tiny_config):
    views = replace(tiny_config().views, brightness=0.8)
    assert bank_views(views, "default").brightness == 0.4 and bank_views(views, "run").brightness == 0.8
    assert bank_views(views, "run").jitter_probability == 1.0


def test_a_predictor_that_knows_the_answer_scores_one_and_a_deaf_one_scores_chance(model, pixels):
    bank = draw_bank(pixels, 0, 32, model=model, strengths="default", seed=0)
    target = target_map(model, bank)
    assert (ranks(distances(target, target)) == 1).all()
    deaf = target.mean(dim=0, keepdim=True).expand_as(target)
    assert float((1 / ranks(distances(deaf, target))).mean()) == pytest.approx(chance(32), abs=1e-6)


def test_without_conditioning_mrr_is_chance_to_three_digits(tiny_config, tiny_shards):
    config = tiny_config(conditioning="none")
    model = world_model.untrained(replace(config, runtime=replace(config.runtime, loader="torch")))
    settings = MrrConfig(run="x", num_images=6, bank_size=16)
    (rank,) = bank_ranks([model], open_shards(tiny_shards.pattern), settings)
    assert rank.shape == (6, 16)
    assert float((1 / rank).mean()) == pytest.approx(chance(16), abs=5e-4)


def test_prediction_uses_the_whole_image_and_the_asked_action(model, pixels):
    action = torch.zeros(2, 7)
    action[1, 0] = 1.0
    copies = pixels[None].expand(2, -1, -1, -1)
    predicted = predicted_map(model, pixels, Bank(pixels=copies, action=action))
    assert predicted.shape == (2, 16 * 16) and not torch.allclose(predicted[0], predicted[1])
    tokens = model.encode(normalize_view(pixels[None]))
    torch.testing.assert_close(model.predict(tokens, action[:1]).flatten(1)[0], predicted[0])


def test_a_label_is_refused_where_none_is_compared_and_where_it_is_no_name():
    for config in (MrrConfig, ImagineConfig):
        with pytest.raises(ValueError, match=r"data\.label must be left unset"):
            config(run="x", data=EvalData(label="json.hue_bin"))
    with pytest.raises(ValueError, match=r"data\.label must be cls or json\.NAME, got 'hue_bin'"):
        EvalData(label="hue_bin")


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run folder: it has no config.yaml"):
        world_model.load(tmp_path)
