"""Pairs of images whose change is known: an untouched or destroyed source, and the same image jittered."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from iwm_fast.evals.datasets import clean_images
from iwm_fast.evals.planning.cem import FLAGS, searched_entries
from iwm_fast.evals.retrieval.bank import bank_views
from iwm_fast.pipelines.config import ViewConfig
from iwm_fast.pipelines.counter_rng import uniforms
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.action import action_vector
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.pipelines.transforms.parameters import Photometry, draw_photometry
from iwm_fast.pipelines.transforms.torch_renderer import render
from iwm_fast.world_model import WorldModel

Kind = Literal["clean", "destroyed"]
"""Of the source: untouched, or with each destruction that the run knows by the toss of a coin."""
KINDS: tuple[Kind, ...] = ("clean", "destroyed")

# of 255: the channels of a photograph without colour are equal but for rounding
_COLOURLESS = 1.0


@dataclass(frozen=True, kw_only=True)
class Task:
    """One pair."""

    sample: int
    source: Float[Tensor, "1 3 H W"]
    target: Float[Tensor, "1 3 H W"]
    action: Float32[np.ndarray, "A"]
    """What leads from one to the other."""
    has_colour: bool
    """Whether the photograph has any: otherwise saturation and hue change nothing."""


def draw_tasks(
    model: WorldModel, shards: ShardSet, samples: Int64[np.ndarray, "images"], *, kind: Kind, split: str, seed: int
) -> Iterator[Task]:
    """Yield one pair for each sample, jittered with the run's own strengths.

    What is drawn is a pure function of seed, split (train or val), kind and sample.
    """
    for pixels, sample in clean_images(model, shards, samples):
        change = draw_change(model.config.views, sample, kind=kind, split=split, seed=seed)
        source, target = (normalize_view(render(pixels[None], view)) for view in change)
        spread = pixels.amax(dim=-1).float() - pixels.amin(dim=-1).float()
        yield Task(
            sample=sample,
            source=source,
            target=target,
            action=action_vector(*change, model.config.views)[0],
            has_colour=bool(spread.mean() >= _COLOURLESS),
        )


def draw_change(views: ViewConfig, sample: int, *, kind: Kind, split: str, seed: int) -> tuple[Photometry, Photometry]:
    """Draw what makes source and target of an untouched image."""
    searched = searched_entries(views)
    tossed = {f"{name}_probability": 0.5 if kind == "destroyed" and name in searched else 0.0 for name in FLAGS}
    of_source, of_target = replace(views, jitter_probability=0.0, **tossed), bank_views(views, "run")
    numbers = (uniforms(seed, f"plan {split} {kind} {of}", sample, np.arange(1), 9) for of in ("source", "target"))
    return (
        draw_photometry(of_source, next(numbers), is_source=True),
        draw_photometry(of_target, next(numbers), is_source=False),
    )


@torch.no_grad()
def pooled(model: WorldModel, task: Task) -> Float[Tensor, "F"]:
    """Return the frozen features of a pair: mean tokens of source and target, and their difference."""
    source, target = (model.encode(view).mean(dim=1)[0] for view in (task.source, task.target))
    return torch.cat([source, target, target - source])
