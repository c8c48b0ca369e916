"""Candidate banks: jittered versions of one image, among which the prediction of a change is looked up.

All families of transformations share the same candidates and differ in the query. `jitter` predicts a candidate from
the clean image; `grayscale`, `blur` and `solarize` predict it from the image they have destroyed.
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

# The reference attention stores all scores of a forward. This many numbers take a few hundred MB with their softmax.
_MAX_ATTENTION_SCORES = 2**26

STRONG_JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}
"""Strong jitter. The strengths are ours, because those of the paper are not known."""


@dataclass(frozen=True, kw_only=True)
class CandidateBank:
    """M jittered versions of an image."""

    pixels: UInt8[Tensor, "M H W 3"]
    photometry: Photometry
    """Parameters that rendered each candidate from the clean image."""

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True, kw_only=True)
class Query:
    """A source image and, for each candidate of a bank, the action that leads to it."""

    source: UInt8[Tensor, "H W 3"]
    action: Float[Tensor, "M A"]


def open_world_model(run: str, device: torch.device, checkpoint: str = "") -> WorldModel:
    """Load a run or an export that has a predictor.

    Raises:
        FileNotFoundError, CheckpointError: if there is no checkpoint or export, or it is damaged.
        ValueError: if its predictor is the identity.
    """
    model = world_model.load(run, device, checkpoint=checkpoint)
    model.require_predictor()
    return model


def with_untrained_predictor(model: WorldModel, seed: int) -> WorldModel:
    """Return the control: the same trained encoder with a randomly initialised predictor."""
    untrained = world_model.build_untrained(replace(model.config, seed=seed), model.device)
    return replace(model, predictor=untrained.predictor)


def bank_views(views: ViewConfig, strengths: str) -> ViewConfig:
    """Return the settings a bank is drawn with; `strengths` is "default", "strong" or "run"."""
    configured = views if strengths == "run" else ViewConfig()
    jitter = STRONG_JITTER if strengths == "strong" else {name: getattr(configured, name) for name in JITTER}
    # With a lower probability, several candidates could be the unchanged image and would tie.
    return replace(views, jitter_probability=1.0, **jitter)


def draw_bank(
    pixels: UInt8[Tensor, "H W 3"], sample: int, size: int, *, model: WorldModel, strengths: str, seed: int
) -> CandidateBank:
    """Render `size` jittered versions of a clean image; the draws depend on seed and sample number only."""
    views = bank_views(model.config.views, strengths)
    photometry = draw_photometry(views, uniforms(seed, "bank", sample, np.arange(size), 9), is_source=False)
    return render_bank(pixels, photometry, model)


def render_bank(pixels: UInt8[Tensor, "H W 3"], photometry: Photometry, model: WorldModel) -> CandidateBank:
    """Render a clean image once for each set of parameters."""
    copies = pixels.to(model.device)[None].expand(len(photometry), -1, -1, -1)
    return CandidateBank(pixels=render(copies, photometry), photometry=photometry)


def source_photometry(family: Family, views: ViewConfig, num_images: int = 1) -> Photometry:
    """Return the parameters of a family's source: no change, or one destructive transformation."""
    neutral = identity_photometry(num_images)
    if family == "jitter":
        return neutral
    # Blur uses the middle of its range, so that all images are blurred equally.
    sigma = np.full(num_images, sum(views.blur_sigma) / 2, np.float32)
    return replace(neutral, blur_sigma=sigma, **{family: np.ones(num_images, bool)})


def make_query(pixels: UInt8[Tensor, "H W 3"], bank: CandidateBank, family: Family, model: WorldModel) -> Query:
    """Return the source of a family and the actions to all candidates, with the run's own entries and scales."""
    views = model.config.views
    source = render(pixels.to(model.device)[None], source_photometry(family, views))[0]
    action = action_vector(source_photometry(family, views, len(bank)), bank.photometry, views)
    return Query(source=source, action=torch.from_numpy(action))


def max_sequences_per_forward(model: WorldModel) -> int:
    """Return how many sequences one forward of the predictor may hold, depending on the model only."""
    length = 2 * model.config.grid**2 + len(model.config.views.entries)
    return max(1, _MAX_ATTENTION_SCORES // (model.config.model.predictor.num_heads * length**2))


@torch.no_grad()
def encode_bank(model: WorldModel, bank: CandidateBank) -> Float[Tensor, "M ND"]:
    """Return the target tokens of each candidate, flattened."""
    chunks = bank.pixels.split(max_sequences_per_forward(model))
    views = (normalize_view(pixels, model.config.data.normalization) for pixels in chunks)
    return torch.cat([model.encode_targets(view).flatten(1) for view in views])


@torch.no_grad()
def predict_query(model: WorldModel, query: Query) -> Float[Tensor, "M ND"]:
    """Return the tokens predicted for each action from all patches of the source at all positions, flattened."""
    tokens = model.encode(normalize_view(query.source[None], model.config.data.normalization))
    chunks = query.action.split(max_sequences_per_forward(model))
    return torch.cat([model.predict_from(tokens.expand(len(chunk), -1, -1), chunk).flatten(1) for chunk in chunks])


def mean_squared_distances(predicted: Float[Tensor, "Q ND"], target: Float[Tensor, "M ND"]) -> Float[Tensor, "Q M"]:
    """Return the mean squared difference of each prediction (row) and each target (column)."""
    # The expanded square (p - t)^2 = p^2 + t^2 - 2pt cancels badly where all tokens share a large offset. Centring
    # and float64 prevent that.
    offset = target.mean(dim=0)
    predicted, target = (predicted - offset).double(), (target - offset).double()
    squared = predicted.square().sum(1)[:, None] + target.square().sum(1)[None] - 2 * predicted @ target.T
    return (squared / predicted.shape[1]).float()


def diagonal_ranks(distance: Float[Tensor, "Q M"]) -> Float32[np.ndarray, "Q"]:
    """Return the rank, from 1, of the correct answer of each row, which is on the diagonal; ties get their mean rank.

    With Q < M, the correct answers are the first Q columns. The rank is NaN if the distance of the correct answer is.
    """
    correct = distance.diagonal()[:, None]
    closer = (distance < correct).sum(dim=1)
    tied = (distance == correct).sum(dim=1) - 1
    rank = 1 + closer.float() + tied.float() / 2
    # Comparisons with NaN are false, which would give half a rank.
    return torch.where(correct[:, 0].isnan(), torch.nan, rank).cpu().numpy()
