"""Linear probe: a linear classifier on frozen, mean-pooled features, standardised as by I-JEPA's BatchNorm.

Heads are initialised to zero, because the problem is convex and does not depend on the initial weights.
"""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from iwm_fast.config.evaluation import LinearConfig
from iwm_fast.evals.probing.feature_batches import FeatureDataset
from iwm_fast.evals.probing.probe import evaluate_probe
from iwm_fast.evals.results import Result
from iwm_fast.runtime.distributed import RankInfo

# The epsilon of the BatchNorm in the probes of MAE and I-JEPA.
_EPS = 1e-6
_BATCH_SIZE = 4096


def evaluate_linear(config: LinearConfig, rank_info: RankInfo | None = None) -> Result:
    """Measure accuracy beside the untrained encoder and save the result. Collective: every rank must call it.

    Raises:
        FileNotFoundError, CheckpointError: if the run or the shards cannot be used.
        ShardError: if a sample has no label, one that no training sample has, or an image that cannot be decoded.
        ValueError: if the settings leave no images to train on or to hold out, or all heads diverge.
    """
    return evaluate_probe("linear", config, "pooled", LinearGrid, rank_info=rank_info)


class LinearGrid(nn.Module):
    """One linear classifier per point of a grid of hyperparameters, all applied in one matrix product."""

    def __init__(self, dataset: FeatureDataset, num_classes: int, num_points: int) -> None:
        """Initialise the heads to zero and compute mean and deviation of each feature of the training examples."""
        super().__init__()
        mean, deviation = feature_statistics(dataset)
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.mean: Tensor
        self.deviation: Tensor
        self.heads = nn.ModuleList(nn.Linear(len(mean), num_classes) for _ in range(num_points))
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        self.to(dataset.device)

    def forward(self, features: Float[Tensor, "B D"]) -> Float[Tensor, "points B K"]:
        """Return the logits of each classifier."""
        weight = torch.cat([head.get_parameter("weight") for head in self.heads])
        bias = torch.cat([head.get_parameter("bias") for head in self.heads])
        logits = functional.linear((features - self.mean) / self.deviation, weight, bias)
        return logits.unflatten(1, (len(self.heads), -1)).transpose(0, 1)


def feature_statistics(dataset: FeatureDataset) -> tuple[Float[Tensor, "D"], Float[Tensor, "D"]]:
    """Return mean and standard deviation of each feature; epsilon keeps the deviation above 0."""
    count, dim = len(dataset), dataset.features.shape[1]
    total, squares = np.zeros(dim), np.zeros(dim)
    for features, _ in dataset.sequential_batches(_BATCH_SIZE):
        total += features.double().sum(dim=0).cpu().numpy()
    # A second pass about the mean avoids the cancellation in E[x^2] - E[x]^2.
    for features, _ in dataset.sequential_batches(_BATCH_SIZE):
        squares += np.square(features.double().cpu().numpy() - total / count).sum(axis=0)
    deviation = np.sqrt(squares / count + _EPS)
    return torch.from_numpy(total / count).float(), torch.from_numpy(deviation).float()
