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
def distances(model: WorldModel, pixels: UInt8[Tensor, "H W 3"], bank: Bank) -> Float[Tensor, "M M"]:
    """Return the squared distance of each asked-for prediction (row) to each member's target tokens (column).

    The untouched image is the source, all its patches are visible and all positions are predicted; the distance is
    the mean over patches and dimensions.
    """
    tokens = model.encode(normalize_view(pixels[None].to(model.device)))
    predictions, targets = [], []
    for action, members in zip(bank.action.split(_CHUNK), bank.pixels.split(_CHUNK), strict=True):
        predictions.append(model.predict(tokens.expand(len(action), -1, -1), action).flatten(1))
        targets.append(model.targets(normalize_view(members)).flatten(1))
    predicted, target = torch.cat(predictions), torch.cat(targets)
    # |p - t|^2 - |p|^2 would rank alike, but float32 cancels badly when tokens share a large offset: centre first
    offset = target.mean(dim=0)
    predicted, target = (predicted - offset).double(), (target - offset).double()
    squared = predicted.square().sum(1)[:, None] + target.square().sum(1)[None] - 2 * predicted @ target.T
    return squared.float() / predicted.shape[1]


def ranks(distance: Float[Tensor, "M M"]) -> Float[Tensor, "M"]:
    """Return the rank of the right answer (the diagonal) in each row, from 1; ties share their middle rank."""
    right = distance.diagonal()[:, None]
    closer = (distance < right).sum(dim=1)
    tied = (distance == right).sum(dim=1) - 1
    return 1 + closer.float() + tied.float() / 2
