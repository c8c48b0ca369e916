"""Linear probe: a linear classifier on frozen, mean-pooled features, standardised as by I-JEPA's BatchNorm.

Its heads begin at zero: the problem is convex, so there is nothing to be drawn.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from iwm_fast.config.evaluation import LinearConfig
from iwm_fast.evals.probing.feature_batches import Examples
from iwm_fast.evals.probing.probe import evaluate_probe
from iwm_fast.evals.results import Result
from iwm_fast.runtime.distributed import RankInfo

# of the BatchNorm in the probes of MAE and I-JEPA
_EPS = 1e-6
_ROWS = 4096


def evaluate_linear(config: LinearConfig, rank_info: RankInfo | None = None) -> Result:
    """Score a run beside its own untrained encoder; write the result; collective.

    Raises:
        FileNotFoundError, CheckpointError: if the run or the shards cannot be used.
        ShardError: if a sample has no label, one that no training sample has, or an image that cannot be decoded.
        ValueError: if settings leave no image to learn from or to choose on, or all heads diverge.
    """
    return evaluate_probe("linear", config, "pooled", LinearGrid, rank_info=rank_info)


class LinearGrid(nn.Module):
    """A linear classifier for each point of a grid, all in one matrix product."""

    def __init__(self, examples: Examples, num_classes: int, num_points: int) -> None:
        """Take mean and spread of each feature from the examples that are learnt from."""
        super().__init__()
        mean, deviation = statistics(examples)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.mean: Tensor
        self.deviation: Tensor
        self.heads = nn.ModuleList(nn.Linear(len(mean), num_classes) for _ in range(num_points))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.to(examples.device)

    def forward(self, rows: Float[Tensor, "B D"]) -> Float[Tensor, "points B K"]:
        """Return the scores of each classifier."""
        weight = torch.cat([head.get_parameter("weight") for head in self.heads])
        bias = torch.cat([head.get_parameter("bias") for head in self.heads])
        scores = functional.linear((rows - self.mean) / self.deviation, weight, bias)
        return scores.unflatten(1, (len(self.heads), -1)).transpose(0, 1)


def statistics(examples: Examples) -> tuple[Float[Tensor, "D"], Float[Tensor, "D"]]:
    """Return mean and standard deviation of each feature, a little above 0."""
    count, dim = len(examples), examples.rows.shape[1]
    total, squares = np.zeros(dim), np.zeros(dim)
    for rows, _ in examples.in_order(_ROWS):
        total += rows.double().sum(dim=0).cpu().numpy()
    for rows, _ in examples.in_order(_ROWS):
        squares += np.square(rows.double().cpu().numpy() - total / count).sum(axis=0)
    deviation = np.sqrt(squares / count + _EPS)
    return torch.from_numpy(total / count).float(), torch.from_numpy(deviation).float()
