"""Heads for every point of a grid of hyperparameters, trained together on the same batches, and the choice of one."""

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
from iwm_fast.evals.probing.feature_batches import Examples
from iwm_fast.monitoring.evaluation_progress import follow
from iwm_fast.pipelines.config import check

Point = tuple[float, float]
"""Peak learning rate and weight decay."""


@runtime_checkable
class Grid(Protocol):
    """One classifier for each point of the grid, all on the same features: an nn.Module."""

    heads: nn.ModuleList
    """What is trained, one for each point."""

    def __call__(self, rows: Shaped[Tensor, "B *rest"]) -> Float[Tensor, "points B K"]:
        """Return each head's scores."""
        ...


@dataclass(frozen=True, kw_only=True)
class Tried:
    """One point of the grid, and what it achieves on the held-out part."""

    lr: float
    weight_decay: float
    accuracy: float | None
    """Unset if the head diverged."""
    loss: float | None


def points_of(config: ProbeConfig) -> tuple[Point, ...]:
    """Return the grid: each learning rate with each weight decay."""
    return tuple(product(config.lrs, config.weight_decays))


def train_grid(grid: Grid, examples: Examples, points: tuple[Point, ...], config: ProbeConfig) -> None:
    """Train each head with its learning rate and weight decay, in place.

    Biases, norms and the query are not decayed.
    """
    groups = []
    for head, (lr, weight_decay) in zip(grid.heads, points, strict=True):
        for decay, is_matrix in ((weight_decay, True), (0.0, False)):
            chosen = [parameter for parameter in head.parameters() if (parameter.ndim > 1) == is_matrix]
            groups.append({"params": chosen, "lr": lr, "peak": lr, "weight_decay": decay})
    optimizer = torch.optim.AdamW(groups)
    total = config.epochs * -(-len(examples) // config.batch_size)
    batches = examples.mixed(config.batch_size, config.epochs, config.seed)
    for step, (rows, label) in enumerate(follow(batches, total, "steps of the probe")):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * (1 + math.cos(math.pi * step / total)) / 2
        optimizer.zero_grad()
        # heads share nothing, so the sum trains each of them as if it were alone
        losses(grid(rows), label).mean(dim=1).sum().backward()
        optimizer.step()


def losses(logits: Float[Tensor, "points B K"], label: Int64[Tensor, "B"]) -> Float[Tensor, "points B"]:
    """Return the cross-entropy of each head and image."""
    every = functional.cross_entropy(logits.flatten(0, 1), label.repeat(len(logits)), reduction="none")
    return every.view(len(logits), -1)


@torch.no_grad()
def score(
    grid: Grid, examples: Examples, batch_size: int
) -> tuple[Bool[np.ndarray, "points images"], Float[np.ndarray, "points"]]:
    """Return of each head what it names rightly, and its mean cross-entropy."""
    correct, loss = [], []
    for rows, label in examples.in_order(batch_size):
        logits = grid(rows)
        correct.append((logits.argmax(dim=2) == label).cpu())
        loss.append(losses(logits, label).double().cpu())
    return torch.cat(correct, dim=1).numpy(), torch.cat(loss, dim=1).mean(dim=1).numpy()


def try_each(grid: Grid, held: Examples, points: tuple[Point, ...], batch_size: int) -> tuple[Tried, ...]:
    """Return what each head achieves on examples that it has not learnt from."""
    correct, loss = score(grid, held, batch_size)
    tried = []
    for point, right, mean in zip(points, correct, loss, strict=True):
        found = (float(right.mean()), float(mean)) if math.isfinite(mean) else (None, None)
        tried.append(Tried(lr=point[0], weight_decay=point[1], accuracy=found[0], loss=found[1]))
    return tuple(tried)


def choose(tried: tuple[Tried, ...]) -> int:
    """Return the number of the most accurate point; of equal ones that of the smaller loss.

    Raises:
        ValueError: if all have diverged.
    """
    merits = {
        number: (one.accuracy, -one.loss)
        for number, one in enumerate(tried)
        if one.accuracy is not None and one.loss is not None
    }
    accepted = "let one head at least learn: all have diverged; name smaller learning rates"
    check(bool(merits), "lrs", tuple(one.lr for one in tried), accepted)
    return max(merits, key=merits.__getitem__)
