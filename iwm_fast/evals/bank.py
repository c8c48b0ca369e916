"""Banks of jittered versions of one image: what a predicted change is looked up in."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from iwm_fast.world_model import WorldModel
from pipelines.actions import Photometry, action_vector, draw_photometry, neutral_photometry
from pipelines.batch import normalize_view
from pipelines.config import ViewConfig
from pipelines.draws import uniforms
from pipelines.views import render

# sequences of one forward: keeps explicit attention of the predictor within some hundred megabytes
_CHUNK = 512


@dataclass(frozen=True, kw_only=True)
class Bank:
    """M jittered versions of one image and the actions that ask for them."""

    pixels: UInt8[Tensor, "M H W 3"]
    action: Float[Tensor, "M A"]
    """Change from the untouched image to each version."""


def bank_views(views: ViewConfig, strengths: str) -> ViewConfig:
    """Return the settings a bank is drawn with: every member jittered, so that no two are the same image."""
    default = ViewConfig()
    own = views if strengths == "run" else default
    jitter = {name: getattr(own, name) for name in ("brightness", "contrast", "saturation", "hue")}
    return replace(views, jitter_probability=1.0, **jitter)


def draw_bank(
    pixels: UInt8[Tensor, "H W 3"], sample: int, size: int, *, model: WorldModel, strengths: str, seed: int
) -> Bank:
    """Render `size` jittered versions of an untouched image; a pure function of seed and sample number."""
    config = bank_views(model.config.views, strengths)
    target: Photometry = draw_photometry(config, uniforms(seed, "bank", sample, np.arange(size), 9), is_source=False)
    # the action is written with the run's own entries and scales: that is the language the predictor knows
    action = action_vector(neutral_photometry(size), target, model.config.views)
    copies = pixels.to(model.device)[None].expand(size, -1, -1, -1)
    return Bank(pixels=render(copies, target), action=torch.from_numpy(action))


@torch.no_grad()
def target_map(model: WorldModel, bank: Bank) -> Float[Tensor, "M ND"]:
    """Return each member's target tokens, flat: what a prediction is compared with."""
    maps = [model.targets(normalize_view(members)).flatten(1) for members in bank.pixels.split(_CHUNK)]
    return torch.cat(maps)


@torch.no_grad()
def predicted_map(model: WorldModel, pixels: UInt8[Tensor, "H W 3"], bank: Bank) -> Float[Tensor, "M ND"]:
    """Return the prediction for each member's action, flat.

    The untouched image is the source, all its patches are visible and all positions are predicted.
    """
    tokens = model.encode(normalize_view(pixels[None].to(model.device)))
    maps = [
        model.predict_from(tokens.expand(len(action), -1, -1), action).flatten(1)
        for action in bank.action.split(_CHUNK)
    ]
    return torch.cat(maps)


def distances(predicted: Float[Tensor, "M ND"], target: Float[Tensor, "M ND"]) -> Float[Tensor, "M M"]:
    """Return the mean squared difference of each prediction (row) and each target (column)."""
    # the expanded square cancels badly where all tokens share a large offset: centre, and add up in float64
    offset = target.mean(dim=0)
    predicted, target = (predicted - offset).double(), (target - offset).double()
    squared = predicted.square().sum(1)[:, None] + target.square().sum(1)[None] - 2 * predicted @ target.T
    return (squared / predicted.shape[1]).float()


def ranks(distance: Float[Tensor, "M M"]) -> Float[Tensor, "M"]:
    """Return the rank of the right answer (the diagonal) in each row, from 1; ties share their middle rank."""
    right = distance.diagonal()[:, None]
    closer = (distance < right).sum(dim=1)
    tied = (distance == right).sum(dim=1) - 1
    return 1 + closer.float() + tied.float() / 2
