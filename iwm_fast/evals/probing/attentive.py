"""Attentive probe: one learned query looks at an image's frozen tokens, then an MLP and a linear classifier."""

from copy import deepcopy
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwm_fast.config.evaluation import AttentiveConfig
from iwm_fast.evals.probing.feature_batches import Examples
from iwm_fast.evals.probing.probe import evaluate_probe
from iwm_fast.evals.results import Result
from iwm_fast.models.heads import AttentiveHead
from iwm_fast.runtime.distributed import RankInfo


def evaluate_attentive(config: AttentiveConfig, rank_info: RankInfo | None = None) -> Result:
    """Score a run beside its own untrained encoder; write the result; collective.

    Raises:
        FileNotFoundError, CheckpointError: if the run or the shards cannot be used.
        ShardError: if a sample has no label, one that no training sample has, or an image that cannot be decoded.
        ValueError: if settings leave no image to learn from or to choose on, the tokens need more room than there is,
            or all heads diverge.
    """
    build = partial(AttentiveGrid, seed=config.seed)
    return evaluate_probe("attentive", config, "tokens", build, max_cache_gb=config.max_cache_gb, rank_info=rank_info)


class AttentiveGrid(nn.Module):
    """An attentive classifier for each point of a grid; all begin with the same weights."""

    def __init__(self, examples: Examples, num_classes: int, num_points: int, *, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head = AttentiveHead(examples.rows.shape[-1], num_classes)
        self.heads = nn.ModuleList(deepcopy(head) for _ in range(num_points)).to(examples.device)

    def forward(self, rows: Float[Tensor, "B N D"]) -> Float[Tensor, "points B K"]:
        """Return the scores of each classifier."""
        tokens = rows.float()
        return torch.stack([head(tokens) for head in self.heads])
