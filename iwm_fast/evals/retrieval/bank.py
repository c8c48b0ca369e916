"""Banks of jittered versions of one image: what a predicted change is looked up in.

The answers are always the same bank. What is asked differs by family: `jitter` leads forward, from the untouched image
to a member; `grayscale`, `blur` and `solarize` lead backward, from the destroyed image to a member.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.config.evaluation import Family
from iwm_fast.pipelines.config import ViewConfig
from iwm_fast.pipelines.counter_rng import uniforms
from iwm_fast.pipelines.transforms.action import action_vector
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.pipelines.transforms.parameters import JITTER, Photometry, draw_photometry, identity_photometry
from iwm_fast.pipelines.transforms.torch_renderer import render
from iwm_fast.world_model import WorldModel

# explicit attention of one forward of the predictor, in numbers: some hundred megabytes with what softmax needs
_MOST_SCORES = 2**26

STRONG_JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
"""The paper's strong jitter; its weak one is the default of views."""


@dataclass(frozen=True, kw_only=True)
class Bank:
    """M jittered versions of one image."""

    pixels: UInt8[Tensor, "M H W 3"]
    photometry: Photometry
    """What made each of them of the untouched image."""

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One source image and the actions that lead from it to each member of a bank."""

    source: UInt8[Tensor, "H W 3"]
    action: Float[Tensor, "M A"]


def open_world_model(run: str, device: torch.device, checkpoint: str = "") -> WorldModel:
    """Load a run that has a predictor, onto a device.

    Raises:
        FileNotFoundError, CheckpointError: as `world_model.load`.
        ValueError: if its predictor is the identity.
    """
    model = world_model.load(run, device, checkpoint=checkpoint)
    model.require_predictor()
    return model


def with_untrained_predictor(model: WorldModel, seed: int) -> WorldModel:
    """Return the control: the same trained encoder under a predictor that has seen nothing."""
    untrained = world_model.untrained(replace(model.config, seed=seed), model.device)
    return replace(model, predictor=untrained.predictor)


def bank_views(views: ViewConfig, strengths: str) -> ViewConfig:
    """Return the settings a bank is drawn with: every member jittered, so that no two are the same image."""
    own = {name: getattr(views if strengths == "run" else ViewConfig(), name) for name in JITTER}
    return replace(views, jitter_probability=1.0, **(STRONG_JITTER if strengths == "strong" else own))


def draw_bank(
    pixels: UInt8[Tensor, "H W 3"], sample: int, size: int, *, model: WorldModel, strengths: str, seed: int
) -> Bank:
    """Render `size` jittered versions of an untouched image; a pure function of seed and sample number."""
    views = bank_views(model.config.views, strengths)
    photometry = draw_photometry(views, uniforms(seed, "bank", sample, np.arange(size), 9), is_source=False)
    return render_bank(pixels, photometry, model)


def render_bank(pixels: UInt8[Tensor, "H W 3"], photometry: Photometry, model: WorldModel) -> Bank:
    """Render one version of an untouched image for each row of the parameters."""
    copies = pixels.to(model.device)[None].expand(len(photometry), -1, -1, -1)
    return Bank(pixels=render(copies, photometry), photometry=photometry)


def source_photometry(family: Family, views: ViewConfig, num_images: int = 1) -> Photometry:
    """Return what a family's source is made with: nothing, or one destruction; blur in the middle of its range."""
    neutral = identity_photometry(num_images)
    if family == "jitter":
        return neutral
    middle = np.full(num_images, sum(views.blur_sigma) / 2, np.float32)
    return replace(neutral, blur_sigma=middle, **{family: np.ones(num_images, bool)})


def ask(pixels: UInt8[Tensor, "H W 3"], bank: Bank, family: Family, model: WorldModel) -> Question:
    """Ask for each member of a bank, in the run's own entries and scales: that is the language the predictor knows."""
    views = model.config.views
    source = render(pixels.to(model.device)[None], source_photometry(family, views))[0]
    action = action_vector(source_photometry(family, views, len(bank)), bank.photometry, views)
    return Question(source=source, action=torch.from_numpy(action))


def sequences_at_once(model: WorldModel) -> int:
    """Return how many predictions fit into one forward; a function of the model alone, so that ranks agree."""
    length = 2 * model.config.grid**2 + len(model.config.views.entries)
    return max(1, _MOST_SCORES // (model.config.model.predictor.num_heads * length**2))


@torch.no_grad()
def target_map(model: WorldModel, bank: Bank) -> Float[Tensor, "M ND"]:
    """Return each member's target tokens, flat: what a prediction is compared with."""
    parts = bank.pixels.split(sequences_at_once(model))
    return torch.cat([model.encode_targets(normalize_view(members)).flatten(1) for members in parts])


@torch.no_grad()
def predicted_map(model: WorldModel, question: Question) -> Float[Tensor, "M ND"]:
    """Return the prediction for each action, flat: all patches of the source are visible, all positions predicted."""
    tokens = model.encode(normalize_view(question.source[None]))
    parts = question.action.split(sequences_at_once(model))
    return torch.cat([model.predict_from(tokens.expand(len(part), -1, -1), part).flatten(1) for part in parts])


def distances(predicted: Float[Tensor, "Q ND"], target: Float[Tensor, "M ND"]) -> Float[Tensor, "Q M"]:
    """Return the mean squared difference of each prediction (row) and each target (column)."""
    # the expanded square cancels badly where all tokens share a large offset: centre, and add up in float64
    offset = target.mean(dim=0)
    predicted, target = (predicted - offset).double(), (target - offset).double()
    squared = predicted.square().sum(1)[:, None] + target.square().sum(1)[None] - 2 * predicted @ target.T
    return (squared / predicted.shape[1]).float()


def ranks(distance: Float[Tensor, "Q M"]) -> Float32[np.ndarray, "Q"]:
    """Return the rank of the right answer (the diagonal) in each row, from 1; ties share their middle rank."""
    right = distance.diagonal()[:, None]
    closer = (distance < right).sum(dim=1)
    tied = (distance == right).sum(dim=1) - 1
    return (1 + closer.float() + tied.float() / 2).cpu().numpy()
