"""Candidate banks: changed versions of one image, among which the prediction of a change is looked up.

Each transformation is a family of queries. One that both views have, such as jitter, predicts a candidate, which it has
changed, from the clean image. One that only the source has, such as blur, predicts a jittered candidate from the image
that it has destroyed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.config.evaluation import READOUTS, Readout
from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.transforms.action import action_vector
from iwm_fast.pipelines.transforms.base import Parameters, PixelOperation
from iwm_fast.pipelines.transforms.composition import ViewConfig, draw_view, identity_parameters
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.pipelines.transforms.torch_renderer import render
from iwm_fast.world_model import WorldModel

# The reference attention stores all scores of a forward. This many numbers take a few hundred MB with their softmax.
_MAX_ATTENTION_SCORES = 2**26
# Of 255. The channels of a photograph without colour differ by no more than rounding and compression make them differ.
_MIN_COLOUR_SPREAD = 1.0


@dataclass(frozen=True, kw_only=True)
class CandidateBank:
    """M changed versions of an image."""

    pixels: UInt8[Tensor, "M H W 3"]
    parameters: Parameters
    """Parameters that rendered each candidate from the clean image."""

    def __len__(self) -> int:
        return len(self.pixels)


@dataclass(frozen=True, kw_only=True)
class Query:
    """A source image and, for each candidate of a bank, the action that leads to it."""

    source: UInt8[Tensor, "H W 3"]
    action: Float[Tensor, "M A"]


def open_world_model(run: str, device: torch.device, checkpoint: str = "", size: int | None = None) -> WorldModel:
    """Load a run or an export that has a predictor, for images of another size if that is set.

    Raises:
        FileNotFoundError, CheckpointError: if there is no checkpoint or export, or it is damaged.
        ValueError: if its predictor is the identity, or patches do not divide `size`.
    """
    model = world_model.load(run, device, checkpoint=checkpoint, size=size)
    model.require_predictor()
    return model


def with_untrained_predictor(model: WorldModel, seed: int) -> WorldModel:
    """Return the control: the same trained encoder with a randomly initialised predictor."""
    untrained = world_model.build_untrained(replace(model.config, seed=seed), model.device)
    return replace(model, predictor=untrained.predictor)


def bank_views(views: ViewConfig, strengths: str) -> ViewConfig:
    """Return the settings a bank is drawn with; `strengths` is "default", "strong" or "run"."""
    forward = [operation for operation in views.operations if operation.family == "forward"]
    return replace(views, **{item.name: item.for_bank(strengths) for item in forward})


def default_families(views: ViewConfig) -> tuple[str, ...]:
    """Return the names of all transformations that change pixels and are on."""
    return tuple(operation.name for operation in views.operations)


def chosen_families(families: tuple[str, ...] | None, views: ViewConfig) -> tuple[str, ...]:
    """Return the transformations to test, for None all that are on.

    Raises:
        ValueError: if one is off in the run.
    """
    known = default_families(views)
    families = known if families is None else families
    unknown = [family for family in families if family not in known]
    require(not unknown, "families", unknown, f"name transformations that are on in the run: {', '.join(known)}")
    return families


def trained_family(views: ViewConfig) -> str | None:
    """Return the first transformation that training applies to both views; None if it applies none."""
    forward = (item for item in views.operations if item.family == "forward" and item.is_trained)
    return next((item.name for item in forward if any(entry.strength for entry in item.entries)), None)


def bank_family(family: str, views: ViewConfig) -> str:
    """Return the transformation that makes a family's candidates: the first forward one, unless the family is one."""
    forward = [operation.name for operation in views.operations if operation.family == "forward"]
    return family if family in forward else forward[0]


def draw_bank(
    pixels: UInt8[Tensor, "H W 3"],
    sample: int,
    size: int,
    *,
    model: WorldModel,
    strengths: str,
    seed: int,
    family: str = "",
) -> CandidateBank:
    """Render `size` changed versions of a clean image; the draws depend on seed and sample number only.

    `family` is that of the queries; unset, candidates are those of the families that share them.
    """
    views = bank_views(model.config.views, strengths)
    parameters = draw_view(views, seed, "bank", sample, np.arange(size), is_source=False)
    for operation in views.operations:
        if operation.family == "forward" and operation.name != bank_family(family, views):
            parameters |= operation.neutral(size)
    return render_bank(pixels, parameters, model)


def render_bank(pixels: UInt8[Tensor, "H W 3"], parameters: Parameters, model: WorldModel) -> CandidateBank:
    """Render a clean image once for each set of parameters."""
    num_candidates = len(next(iter(parameters.values())))
    copies = pixels.to(model.device)[None].expand(num_candidates, -1, -1, -1)
    return CandidateBank(pixels=render(copies, parameters, model.config.views), parameters=parameters)


def source_parameters(family: str, views: ViewConfig, num_images: int = 1) -> Parameters:
    """Return the parameters of a family's source: no change, or one destructive transformation."""
    operation: PixelOperation = getattr(views, family)
    return identity_parameters(views, num_images) | operation.query_source(num_images)


def has_colour(pixels: UInt8[Tensor, "H W 3"]) -> bool:
    """Return whether a photograph has colours; without them, some changes cannot be seen."""
    spread = pixels.amax(dim=-1).float() - pixels.amin(dim=-1).float()
    return bool(spread.mean() >= _MIN_COLOUR_SPREAD)


def make_query(pixels: UInt8[Tensor, "H W 3"], bank: CandidateBank, family: str, model: WorldModel) -> Query:
    """Return the source of a family and the actions to all candidates, with the run's own entries and scales."""
    views = model.config.views
    source = render(pixels.to(model.device)[None], source_parameters(family, views), views)[0]
    action = action_vector(source_parameters(family, views, len(bank)), bank.parameters, views)
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
def read_out(
    model: WorldModel, query: Query, readouts: Sequence[Readout] = READOUTS
) -> Iterator[Float[Tensor, "Q ND"]]:
    """Yield what each readout gives for all actions of a query: tokens at all positions, flattened."""
    tokens = model.encode(normalize_view(query.source[None], model.config.data.normalization))
    chunks = query.action.split(max_sequences_per_forward(model))
    predicted = torch.cat([model.predict_from(tokens, chunk).flatten(1) for chunk in chunks])
    for readout in readouts:
        yield predicted + model.readout_offset(tokens, readout).flatten(1)


def query_distances(
    model: WorldModel, query: Query, target: Float[Tensor, "M ND"], readouts: Sequence[Readout]
) -> Float[Tensor, "readouts Q M"]:
    """Return the mean squared differences of each prediction of a query and each target, for each readout."""
    return torch.stack([mean_squared_distances(tokens, target) for tokens in read_out(model, query, readouts)])


def metric_name(metric: str, readout: Readout) -> str:
    """Return the name of a metric of predictions, which is the metric's own for the absolute readout."""
    return metric if readout == "absolute" else f"{metric}_{readout}_readout"


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
