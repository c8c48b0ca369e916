"""The cross-entropy method over actions: draw candidates, keep the best, and fit the next distribution to them.

Numbers, such as jitter, are drawn from normal distributions, which start with the mean and standard deviation of
training's actions, and flags from Bernoulli distributions. Candidates are clipped to the range of training's actions.
Draws are a function of seed, sample and round, and forwards never mix images, so the result for an image depends
neither on the rank that searches it nor on the other images.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from iwm_fast.config.evaluation import PlanConfig, Readout
from iwm_fast.evals.retrieval.bank import max_sequences_per_forward
from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.counter_rng import uniforms
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.world_model import WorldModel

# A flag that no elite candidate has keeps this probability, so that the search can return to it.
_MIN_FLAG_PROBABILITY = 0.02

DistanceFunction = Callable[[Float32[np.ndarray, "P A"]], Float64[np.ndarray, "P"]]
"""Returns the distance of the prediction for each of P actions to a fixed target."""


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Initial distribution of the actions, in units of the predictor; entries that are not searched are always 0."""

    mean: Float64[np.ndarray, "A"]
    """Mean of a number, probability of a flag."""
    std: Float64[np.ndarray, "A"]
    """Standard deviation of a number, 0 for a flag."""
    limit: Float64[np.ndarray, "A"]
    """Largest value of an entry; the smallest is its negative for a number and 0 for a flag."""
    is_flag: Bool[np.ndarray, "A"]


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The best of all candidates of a search."""

    action: Float32[np.ndarray, "A"]
    distance: float
    """Mean squared difference of its prediction and the target's tokens."""


def searched_entries(views: ViewConfig) -> tuple[str, ...]:
    """Return the entries of the action that describe pixels and that training varies."""
    entries = [entry for operation in views.operations if operation.is_trained for entry in operation.entries]
    varied = {entry.name for entry in entries if entry.is_flag or entry.strength > 0}
    return tuple(name for name in views.entries if name in varied)


def training_prior(views: ViewConfig) -> Prior:
    """Return the distribution of the actions that training shows.

    Raises:
        ValueError: if the run's actions have no entry that describes pixels and that training varies.
    """
    searched = searched_entries(views)
    names = ", ".join(entry.name for operation in views.operations for entry in operation.entries)
    require(bool(searched), "run", views.entries,
          f"have actions with an entry to search for: {names}; and be trained with it")  # fmt: skip
    spread = {entry.name: item.spread(entry.name) for item in views.operations for entry in item.entries}
    # Crop and flip are not searched for.
    mean, std, limit = np.array([spread[name] if name in searched else (0.0, 0.0, 0.0) for name in views.entries]).T
    is_flag = np.array([views.all_entries[name].is_flag for name in views.entries])
    return Prior(mean=mean, std=std, limit=limit, is_flag=is_flag)


def search(distance: DistanceFunction, prior: Prior, config: PlanConfig, sample: int) -> SearchResult:
    """Return the best of `population` candidates in each of `rounds` rounds, the one with the smallest distance."""
    mean, std = prior.mean, prior.std
    num_elites = max(2, round(config.elite_share * config.population))
    best = SearchResult(action=np.zeros(len(mean), np.float32), distance=np.inf)
    for number in range(config.rounds):
        uniform = uniforms(config.seed, f"plan round {number}", sample, np.arange(config.population), len(mean))
        candidates = _draw(mean, std, prior, uniform)
        distances = distance(candidates)
        order = np.argsort(distances, kind="stable")
        if distances[order[0]] < best.distance:
            best = SearchResult(action=candidates[order[0]], distance=float(distances[order[0]]))
        elites = candidates[order[:num_elites]].astype(np.float64)
        # The spread is taken about the previous mean. About the elites' own mean it would shrink, and the search would
        # stop moving, while the mean is still far from the best action.
        std = np.where(prior.is_flag, 0.0, np.sqrt(((elites - mean) ** 2).mean(axis=0)))
        mean = elites.mean(axis=0)
    return best


def _draw(
    mean: Float64[np.ndarray, "A"], std: Float64[np.ndarray, "A"], prior: Prior, uniform: Float64[np.ndarray, "P A"]
) -> Float32[np.ndarray, "P A"]:
    # A uniform number of 0 would become minus infinity, and NaN where the standard deviation is 0.
    normal = torch.special.ndtri(torch.from_numpy(np.maximum(uniform, 1e-12))).numpy()
    numbers = np.clip(mean + std * normal, -prior.limit, prior.limit)
    flags = (uniform < np.clip(mean, _MIN_FLAG_PROBABILITY, 1 - _MIN_FLAG_PROBABILITY)) * prior.limit
    return np.where(prior.is_flag, flags, numbers).astype(np.float32)


def distance_to(
    model: WorldModel, source: Float[Tensor, "1 3 H W"], target: Float[Tensor, "1 3 H W"], readout: Readout
) -> DistanceFunction:
    """Return a function that measures how far predictions from the source are from the target's tokens."""
    # Encoded once for all rounds of a search.
    source_tokens, target_tokens = model.encode(source), model.encode_targets(target)
    chunk_size = max_sequences_per_forward(model)

    def distance(actions: Float32[np.ndarray, "P A"]) -> Float64[np.ndarray, "P"]:
        chunks = torch.from_numpy(actions).split(chunk_size)
        predictions = (model.predict_from(source_tokens, chunk, readout=readout) for chunk in chunks)
        distances = [(predicted - target_tokens).square().mean(dim=(1, 2)) for predicted in predictions]
        return torch.cat(distances).double().cpu().numpy()

    return distance
