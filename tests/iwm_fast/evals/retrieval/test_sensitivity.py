"""Sensitivity: 0 for features that ignore a change, and the share of the distance of two images for others."""

import numpy as np
import pytest
import torch

from iwm_fast.config.evaluation import SensitivityConfig
from iwm_fast.evals.datasets import clean_images
from iwm_fast.evals.retrieval.sensitivity import _with_partners, measure_images
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.world_model import WorldModel


class MeanColours(WorldModel):
    """A world model whose tokens are the mean colours of their patches."""

    def encode(self, view, *_, **__):
        return view.unfold(2, 4, 4).unfold(3, 4, 4).flatten(2, 3).mean(dim=(3, 4)).transpose(1, 2)


class Blind(WorldModel):
    """A world model whose tokens do not depend on the image."""

    def encode(self, view, *_, **__):
        return torch.ones(len(view), 16, 8)


def as_model(kind, model):
    return kind(config=model.config, encoder=model.encoder, predictor=model.predictor, step=0)


def measure(model, shards, pairs, **settings):
    config = SensitivityConfig(run="x", **settings)
    families = settings.get("families", ("jitter",))
    return torch.stack(list(measure_images([model], families, shards, np.array(pairs), config)))[:, 0]


@pytest.fixture
def shards(tiny_shards):
    return open_shards(tiny_shards.pattern)


def test_features_that_ignore_the_image_have_distance_0(model, shards):
    distances = measure(as_model(Blind, model), shards, [0, 1], bank_size=4)
    assert distances.shape == (1, 2, 2) and not distances.any()


def test_distances_are_those_of_changed_versions_and_of_the_partner(model, shards):
    model = as_model(MeanColours, model)
    distances = measure(model, shards, [0, 5, 2, 7], families=("jitter", "grayscale"))
    assert distances.shape == (2, 3, 2) and (distances > 0).all()
    # A mean over patches cannot differ more than the patches do.
    assert (distances[..., 1] <= distances[..., 0] + 1e-6).all()
    (first, _), (second, _) = clean_images(model, shards, np.array([0, 5]))
    views = normalize_view(torch.stack([first, second]), model.config.data.normalization)
    tokens = model.encode(views)
    expected = (tokens[0] - tokens[1]).square().mean()
    torch.testing.assert_close(distances[0, -1, 0], expected, rtol=1e-4, atol=1e-6)


def test_stronger_changes_move_features_further(model, shards):
    model = as_model(MeanColours, model)
    weak, strong = (measure(model, shards, [0, 5, 1, 6], bank=bank)[:, 0, 0].mean() for bank in ("default", "strong"))
    assert strong > weak


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_partners_do_not_depend_on_the_number_of_ranks(num_ranks):
    samples = np.array([0, 3, 6, 9, 12])
    pairs = [_with_partners(samples[rank::num_ranks], samples).reshape(-1, 2) for rank in range(num_ranks)]
    assert {tuple(pair) for pair in np.concatenate(pairs).tolist()} == {(0, 6), (3, 9), (6, 12), (9, 0), (12, 3)}
