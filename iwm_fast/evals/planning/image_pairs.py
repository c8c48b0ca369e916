"""Pairs of images whose change is known: a clean or destroyed source, and the same image jittered as the target."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from iwm_fast.evals.datasets import clean_images
from iwm_fast.evals.planning.cem import searched_entries
from iwm_fast.evals.retrieval.bank import bank_views, has_colour
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.action import action_vector
from iwm_fast.pipelines.transforms.base import Parameters
from iwm_fast.pipelines.transforms.composition import ViewConfig, draw_view
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.pipelines.transforms.torch_renderer import render
from iwm_fast.world_model import WorldModel

SourceKind = Literal["clean", "destroyed"]
"""A clean source is unchanged; a destroyed one has each transformation that the run knows with probability 1/2."""
SOURCE_KINDS: tuple[SourceKind, ...] = ("clean", "destroyed")


@dataclass(frozen=True, kw_only=True)
class ImagePair:
    """A source and a target view of one image, normalised, and the action that leads from one to the other."""

    sample: int
    source: Float[Tensor, "1 3 H W"]
    target: Float[Tensor, "1 3 H W"]
    action: Float32[np.ndarray, "A"]
    has_colour: bool
    """Whether the photograph has colours; without them, some changes cannot be seen."""


def draw_pairs(
    model: WorldModel,
    shards: ShardSet,
    samples: Int64[np.ndarray, "images"],
    *,
    kind: SourceKind,
    split: str,
    seed: int,
) -> Iterator[ImagePair]:
    """Yield one pair for each sample, with a target jittered at the run's strengths.

    Draws are a function of seed, split ("train" or "val"), kind and sample.
    """
    for pixels, sample in clean_images(model, shards, samples):
        change = draw_change(model.config.views, sample, kind=kind, split=split, seed=seed)
        rendered = (render(pixels[None], parameters, model.config.views) for parameters in change)
        source, target = (normalize_view(view, model.config.data.normalization) for view in rendered)
        (action,) = action_vector(*change, model.config.views)
        yield ImagePair(sample=sample, source=source, target=target, action=action, has_colour=has_colour(pixels))


def draw_change(
    views: ViewConfig, sample: int, *, kind: SourceKind, split: str, seed: int
) -> tuple[Parameters, Parameters]:
    """Draw the parameters that render source and target from a clean image."""
    searched, purpose = set(searched_entries(views)), f"plan {split} {kind}"
    inverse = [item for item in views.operations if item.family == "inverse" and kind == "destroyed"]
    destroying = [item for item in inverse if {entry.name for entry in item.entries} & searched]
    source_views = replace(views, **{item.name: replace(item, probability=0.5) for item in destroying})
    source = draw_view(source_views, seed, f"{purpose} source", sample, np.arange(1), is_source=True)
    for operation in views.operations:
        if operation not in destroying:
            source |= operation.query_source(1) if operation.family == "forward" else operation.neutral(1)
    target_views = bank_views(views, "run")
    return source, draw_view(target_views, seed, f"{purpose} target", sample, np.arange(1), is_source=False)


@torch.no_grad()
def pooled_features(model: WorldModel, pair: ImagePair) -> Float[Tensor, "F"]:
    """Return the frozen features of a pair: mean tokens of source and target, and their difference."""
    source, target = (model.encode(view).mean(dim=1)[0] for view in (pair.source, pair.target))
    return torch.cat([source, target, target - source])
