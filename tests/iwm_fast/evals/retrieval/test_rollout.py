"""Roll-outs: the sum of several actions, and how predicted tokens are fed back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fixtures.exact_predictor import Pair, exact, ignore_action
from fixtures.tiny_pretraining import tiny_run
from fixtures.untrained_decoder import untrained_decoder
from iwm_fast import world_model
from iwm_fast.checkpoints.pixel_decoder import save_pixel_decoder
from iwm_fast.config.evaluation import READOUTS, MrrConfig, RolloutConfig
from iwm_fast.evals.datasets import clean_images, evenly_spaced
from iwm_fast.evals.retrieval.bank import draw_bank, encode_bank
from iwm_fast.evals.retrieval.imagined import find_decoder
from iwm_fast.evals.retrieval.mrr import chance_mrr, evaluate_mrr
from iwm_fast.evals.retrieval.repeated_actions import roll_out
from iwm_fast.evals.retrieval.rollout import evaluate_rollout
from iwm_fast.evals.retrieval.rollout_strips import draw_strip
from iwm_fast.pipelines.config import IMAGENET
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.train import run


class AddAction(nn.Module):
    """Adds a vector in proportion to the action to the target tokens of the source.

    The encoder's last norm multiplies tokens by `weight` and adds `bias`, which are the same for all dimensions.
    """

    def __init__(self, num_entries: int, dim: int, *, weight: float, bias: float) -> None:
        super().__init__()
        self.vectors = torch.randn(num_entries, dim)
        self.weight, self.bias = weight, bias

    def forward(self, context_tokens, action, context, target):
        tokens = (context_tokens.unflatten(0, (len(action), -1)) - self.bias) / self.weight
        return (tokens + (action @ self.vectors)[:, None]).flatten(0, 1)


@pytest.mark.parametrize("num_actions", [2, 3, 5])
def test_equal_parts_of_an_action_add_up_in_the_space_of_the_encoders_tokens(model, num_actions):
    model.encoder.norm.weight.fill_(3.0)
    model.encoder.norm.bias.fill_(2.0)
    model = replace(model, predictor=AddAction(7, 16, weight=3.0, bias=2.0))
    tokens, action = model.encode(torch.randn(1, 3, 16, 16)), torch.randn(4, 7)
    at_once, in_parts = (roll_out(model, tokens, action, n, readout="absolute") for n in (1, num_actions))
    torch.testing.assert_close(at_once, model.predict_from(tokens, action))
    torch.testing.assert_close(in_parts, at_once, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("readout", READOUTS)
def test_a_predictor_that_ignores_the_action_never_leaves_the_source(model, readout):
    view = torch.randn(1, 3, 16, 16)
    rolled_out = roll_out(ignore_action(model), model.encode(view), torch.randn(4, 7), 5, readout=readout)
    torch.testing.assert_close(rolled_out, model.encode_targets(view).expand(4, -1, -1), atol=1e-4, rtol=1e-4)


def test_a_strip_shows_each_part_of_the_change_beside_its_rendering(model, pixels):
    exact_model = exact(model, Pair(source=pixels, clean=pixels))
    config = RolloutConfig(run="x", bank="strong", max_actions=3)
    strip = draw_strip(pixels, 4, exact_model, untrained_decoder(model), config)
    rendered, at_once, *_ = strip.rows
    assert strip.labels[:3] == ("rendered", "in one action, absolute", "an action per part, absolute")
    assert {len(row) for row in strip.rows} == {4} and len(strip.rows) == 5
    bank = draw_bank(pixels, 4, 1, model=model, strengths="strong", seed=0)
    assert np.array_equal(rendered[0].pixels, pixels.numpy())
    # Parts of the action are added up, which rounds.
    assert np.abs(rendered[3].pixels.astype(int) - bank.pixels[0].numpy()).max() <= 1
    assert [panel.caption for panel in at_once] == ["the source's own tokens", *["distance 0.000"] * 3]
    no_change = [float(panel.caption.rpartition(" ")[2]) for panel in rendered[1:]]
    assert no_change == sorted(no_change) and no_change[0] > 0 and "1/3; no change" in rendered[1].caption


def test_rows_compare_several_actions_with_one_and_with_no_change(tiny_shards, tmp_path):
    folder = str(tmp_path / "run")
    config = tiny_run(tiny_shards, tmp_path / "run", loader="torch")
    optim = replace(config.optim, epochs=1.0, warmup_epochs=0.0)
    run(replace(config, data=replace(config.data, val=tiny_shards.pattern), optim=optim))
    shared = {"run": folder, "num_images": 3, "bank_size": 6, "bank": "strong", "device": "cpu"}
    picture = tmp_path / "run" / "evaluations" / "rollout_strong.png"
    result = evaluate_rollout(RolloutConfig(**shared, max_actions=3))
    assert result.name == "rollout_strong" and not picture.exists()
    save_pixel_decoder(folder, untrained_decoder(world_model.load(folder)))
    assert evaluate_rollout(RolloutConfig(**shared, max_actions=3)) == result and picture.exists()
    assert find_decoder(folder, world_model.load(folder)) is not None
    assert find_decoder(folder, world_model.load(folder, size=32)) is None
    metrics = ("distance", "mrr", "distance_difference_readout", "mrr_difference_readout")
    counts = ("1 action", "2 actions", "3 actions")
    rows = [(row.subject, row.metric) for row in result.rows]
    assert rows == [("no change", "distance"), *((count, metric) for count in counts for metric in metrics)]
    for row in result.rows[1:]:
        assert row.low <= row.value <= row.high and row.control_name == "untrained predictor" and row.num_samples == 3
        assert row.chance == (chance_mrr(6) if row.metric.startswith("mrr") else None)
    one_action = evaluate_mrr(MrrConfig(**shared, families=("jitter",)))
    for metric in ("mrr", "mrr_difference_readout"):
        expected, row = one_action.row("jitter", metric), result.row("1 action", metric)
        assert (row.value, row.control) == pytest.approx((expected.value, expected.control), rel=1e-5)
        assert result.value("3 actions", metric) != row.value
    assert result.value("no change", "distance") == pytest.approx(distance_of_sources(folder), rel=1e-4)


def distance_of_sources(folder) -> float:
    """Return the mean distance of the target tokens of clean images to those of their banks."""
    model = world_model.load(folder)
    shards = open_shards(model.config.data.val)
    distances = []
    for pixels, sample in clean_images(model, shards, evenly_spaced(shards.num_samples, 3)):
        bank = draw_bank(pixels, sample, 6, model=model, strengths="strong", seed=0)
        own = model.encode_targets(normalize_view(pixels[None], IMAGENET)).flatten(1)
        distances.append(float((own - encode_bank(model, bank)).square().mean()))
    return float(np.mean(distances))


def test_fewer_than_two_actions_are_refused():
    with pytest.raises(ValueError, match="max_actions must be between 2 and 100, got 1"):
        RolloutConfig(run="x", max_actions=1)
