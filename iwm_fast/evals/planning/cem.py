"""The cross-entropy method over actions: draw many, keep the best, draw the next ones like those.

Jitter is drawn from a normal distribution for each entry, starting as wide as training's, and flags from a coin of
their own, so that each action tried is one that training could have shown. The spread of the next round is that of the
best about the mean they were drawn around. Draws are functions of (seed, sample,
round), and each image's actions are predicted in forwards of their own: so the outcome does not depend on which rank
an image is searched on, nor on which others are.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from iwm_fast.config.evaluation import PlanConfig
from iwm_fast.evals.retrieval.bank import sequences_at_once
from iwm_fast.pipelines.config import ViewConfig, check
from iwm_fast.pipelines.counter_rng import uniforms
from iwm_fast.pipelines.transforms.parameters import JITTER
from iwm_fast.world_model import WorldModel

FLAGS = ("grayscale", "blur", "solarize")
# a flag that none of the best has can still come back
_LEAST = 0.02

Distance = Callable[[Float32[np.ndarray, "P A"]], Float64[np.ndarray, "P"]]


@dataclass(frozen=True, kw_only=True)
class Prior:
    """Where a search begins, in the units that the predictor is told; what it leaves alone is always 0."""

    mean: Float64[np.ndarray, "A"]
    """Of a flag: its probability."""
    std: Float64[np.ndarray, "A"]
    limit: Float64[np.ndarray, "A"]
    """Largest value; the smallest is its negative, or 0 for a flag."""
    is_flag: Bool[np.ndarray, "A"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """The best action that a search has tried."""

    action: Float32[np.ndarray, "A"]
    distance: float
    """Mean squared difference of its prediction and the target's tokens."""


def searched_entries(views: ViewConfig) -> tuple[str, ...]:
    """Return the entries of the action that training has varied; not where the source lies, if that was varied."""
    varied = [name for name in FLAGS if getattr(views, f"{name}_probability") > 0]
    varied += [name for name in JITTER if views.jitter_probability > 0 and getattr(views, name) > 0]
    return tuple(name for name in views.entries if name in varied)


def training_prior(views: ViewConfig) -> Prior:
    """Return mean and spread of the differences that training shows, and their largest.

    Raises:
        ValueError: if the run's actions have no photometric entry that training has varied.
    """
    searched = searched_entries(views)
    check(bool(searched), "run", views.entries,
          "have actions with an entry to search for: brightness, contrast, saturation, hue, blur, grayscale or "
          "solarize, and be trained with it")  # fmt: skip
    is_flag = np.array([name in FLAGS for name in views.entries])
    is_searched = np.array([name in searched for name in views.entries])
    # two factors, each with this probability uniform within one strength of neutral, and their difference
    spread, limit = (2 * views.jitter_probability / 3) ** 0.5, 2.0
    chances = np.array([getattr(views, f"{name}_probability") if name in FLAGS else 0.0 for name in views.entries])
    return Prior(
        mean=chances * is_searched,
        std=np.where(is_flag, 0.0, spread) * is_searched,
        limit=np.where(is_flag, 1.0, limit) * is_searched,
        is_flag=is_flag,
    )


def search(distance: Distance, prior: Prior, config: PlanConfig, sample: int) -> Found:
    """Return the action of the smallest distance, of `population` tried in each of `rounds` rounds."""
    mean, std = prior.mean, prior.std
    num_kept = max(2, round(config.elite_share * config.population))
    best = Found(action=np.zeros(len(mean), np.float32), distance=np.inf)
    for number in range(config.rounds):
        uniform = uniforms(config.seed, f"plan round {number}", sample, np.arange(config.population), len(mean))
        tried = _draw(mean, std, prior, uniform)
        found = distance(tried)
        order = np.argsort(found, kind="stable")
        if found[order[0]] < best.distance:
            best = Found(action=tried[order[0]], distance=float(found[order[0]]))
        kept = tried[order[:num_kept]].astype(np.float64)
        # not about their own mean: the search would narrow while it is still on its way
        std = np.where(prior.is_flag, 0.0, np.sqrt(((kept - mean) ** 2).mean(axis=0)))
        mean = kept.mean(axis=0)
    return best


def _draw(
    mean: Float64[np.ndarray, "A"],
    std: Float64[np.ndarray, "A"],
    prior: Prior,
    uniform: Float64[np.ndarray, "P A"],
) -> Float32[np.ndarray, "P A"]:
    # 0 would be drawn at minus infinity, and 0 times that is no number
    normal = torch.special.ndtri(torch.from_numpy(np.maximum(uniform, 1e-12))).numpy()
    jitter = np.clip(mean + std * normal, -prior.limit, prior.limit)
    flags = (uniform < np.clip(mean, _LEAST, 1 - _LEAST)) * prior.limit
    return np.where(prior.is_flag, flags, jitter).astype(np.float32)


def distance_to(model: WorldModel, source: Float[Tensor, "1 3 H W"], target: Float[Tensor, "1 3 H W"]) -> Distance:
    """Return what measures actions: how far the prediction from the source is from the target's tokens.

    Both are encoded once.
    """
    tokens, wanted = model.encode(source), model.encode_targets(target)
    at_once = sequences_at_once(model)

    def measure(action: Float32[np.ndarray, "P A"]) -> Float64[np.ndarray, "P"]:
        parts = torch.from_numpy(action).split(at_once)
        predicted = (model.predict_from(tokens.expand(len(part), -1, -1), part) for part in parts)
        return torch.cat([(one - wanted).square().mean(dim=(1, 2)) for one in predicted]).double().cpu().numpy()

    return measure
