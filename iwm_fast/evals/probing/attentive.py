"""Attentive probe: a learned query attends to an image's frozen tokens, followed by an MLP and a linear classifier."""

from copy import deepcopy
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwm_fast.config.evaluation import AttentiveConfig
from iwm_fast.evals.probing.feature_batches import FeatureDataset
from iwm_fast.evals.probing.probe import evaluate_probe
from iwm_fast.evals.results import Result
from iwm_fast.models.heads import AttentiveHead
from iwm_fast.runtime.distributed import RankInfo


def evaluate_attentive(config: AttentiveConfig, rank_info: RankInfo | None = None) -> Result:
    """Measure accuracy beside the untrained encoder and save the result. Collective: every rank must call it.

    Raises:
        FileNotFoundError, CheckpointError: if the run or the shards cannot be used.
        ShardError: if a sample has no label, one that no training sample has, or an image that cannot be decoded.
        ValueError: if the settings leave no images to train on or to hold out, the tokens do not fit on the disk, or
            all heads diverge.
    """
    build = partial(AttentiveGrid, seed=config.seed)
    return evaluate_probe("attentive", config, "tokens", build, max_cache_gb=config.max_cache_gb, rank_info=rank_info)


class AttentiveGrid(nn.Module):
    """One attentive head per point of a grid of hyperparameters, all with the same initial weights."""

    def __init__(self, dataset: FeatureDataset, num_classes: int, num_points: int, *, seed: int) -> None:
        super().__init__()
        # A fork leaves the global generator of the caller unchanged.
        with torch.random.fork_rng(devices=[]):
            # New weights are drawn on the CPU. torch.manual_seed would also seed the generators of GPUs.
            torch.default_generator.manual_seed(seed)
            head = AttentiveHead(dataset.features.shape[-1], num_classes)
        self.heads = nn.ModuleList(deepcopy(head) for _ in range(num_points)).to(dataset.device)

    def forward(self, features: Float[Tensor, "B N D"]) -> Float[Tensor, "points B K"]:
        """Return the logits of each head."""
        # Tokens are cached in float16.
        tokens = features.float()
        return torch.stack([head(tokens) for head in self.heads])
