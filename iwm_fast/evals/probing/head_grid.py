"""A search over a grid of hyperparameters: one head per point, trained together on the same batches."""

import math
from dataclasses import dataclass
from itertools import product
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor, nn
from torch.nn import functional

from iwm_fast.config.evaluation import ProbeConfig
from iwm_fast.evals.probing.feature_batches import FeatureDataset
from iwm_fast.monitoring.evaluation_progress import track_progress

GridPoint = tuple[float, float]
"""Peak learning rate and weight decay."""


class DivergenceError(ValueError):
    """All heads of a probe have diverged."""


@runtime_checkable
class HeadGrid(Protocol):
    """A module that classifies the same features with one head per point of the grid."""

    heads: nn.ModuleList
    """Trainable heads, in the order of the points."""

    def __call__(self, features: Shaped[Tensor, "B *rest"]) -> Float[Tensor, "points B K"]:
        """Return the logits of each head."""
        ...


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A point of the grid, with accuracy and loss of its head on the held-out images."""

    lr: float
    weight_decay: float
    accuracy: float | None
    """Accuracy, 0 to 1; None if the head diverged."""
    loss: float | None
    """Mean cross-entropy; None if the head diverged."""


def grid_points(config: ProbeConfig) -> tuple[GridPoint, ...]:
    """Return all pairs of a learning rate and a weight decay."""
    return tuple(product(config.lrs, config.weight_decays))


def train_grid(grid: HeadGrid, dataset: FeatureDataset, points: tuple[GridPoint, ...], config: ProbeConfig) -> None:
    """Train each head in place with its learning rate, decayed to 0 by a cosine, and its weight decay."""
    groups = []
    for head, (lr, weight_decay) in zip(grid.heads, points, strict=True):
        # Biases, the scales of norms and the query are vectors, which are not decayed.
        for decay, is_matrix in ((weight_decay, True), (0.0, False)):
            parameters = [parameter for parameter in head.parameters() if (parameter.ndim > 1) == is_matrix]
            groups.append({"params": parameters, "lr": lr, "peak": lr, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups)
    num_steps = config.epochs * -(-len(dataset) // config.batch_size)
    batches = dataset.shuffled_batches(config.batch_size, config.epochs, config.seed)
    for step, (features, label) in enumerate(track_progress(batches, num_steps, "steps of the probe")):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 + math.cos(math.pi * step / num_steps)) / 2
        optimizer.zero_grad()
        # Heads share no parameters, so the gradient of the sum trains each head as if it were alone.
        losses(grid(features), label).mean(dim=1).sum().backward()
        optimizer.step()


def losses(logits: Float[Tensor, "points B K"], label: Int64[Tensor, "B"]) -> Float[Tensor, "points B"]:
    """Return the cross-entropy of each head and image."""
    flat = functional.cross_entropy(logits.flatten(0, 1), label.repeat(len(logits)), reduction="none")
    return flat.view(len(logits), -1)


@torch.no_grad()
def score_heads(
    grid: HeadGrid, dataset: FeatureDataset, batch_size: int
) -> tuple[Bool[np.ndarray, "points images"], Float[np.ndarray, "points"]]:
    """Return, for each head, whether it classifies each image correctly, and its mean cross-entropy."""
    correct, loss = [], []
    for features, label in dataset.sequential_batches(batch_size):
        logits = grid(features)
        correct.append((logits.argmax(dim=2) == label).cpu())
        loss.append(losses(logits, label).double().cpu())
    return torch.cat(correct, dim=1).numpy(), torch.cat(loss, dim=1).mean(dim=1).numpy()


def score_candidates(
    grid: HeadGrid, held_out: FeatureDataset, points: tuple[GridPoint, ...], batch_size: int
) -> tuple[Candidate, ...]:
    """Return accuracy and loss of each head on held-out examples."""
    correct, loss = score_heads(grid, held_out, batch_size)
    candidates = []
    for (lr, weight_decay), is_correct, mean in zip(points, correct, loss, strict=True):
        accuracy, finite_loss = (float(is_correct.mean()), float(mean)) if math.isfinite(mean) else (None, None)
        candidates.append(Candidate(lr=lr, weight_decay=weight_decay, accuracy=accuracy, loss=finite_loss))
    return tuple(candidates)


def best_candidate(candidates: tuple[Candidate, ...]) -> int:
    """Return the index of the most accurate candidate; the smaller loss decides between equal accuracies.

    Raises:
        DivergenceError: if all heads have diverged.
    """
    merits = {
        index: (candidate.accuracy, -candidate.loss)
        for index, candidate in enumerate(candidates)
        if candidate.accuracy is not None and candidate.loss is not None
    }
    if not merits:
        lrs = tuple(candidate.lr for candidate in candidates)
        raise DivergenceError(
            f"lrs must let at least one head converge, but all heads diverged; use smaller learning rates, got {lrs}"
        )
    return max(merits, key=merits.__getitem__)
