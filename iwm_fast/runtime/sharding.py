"""Sharing an evaluation between ranks: each rank computes its share of the samples, and all ranks get all results.

Collectives need shares of equal size, so shorter shares are padded with `PADDING`, whose rows are dropped when results
are gathered. Results are in the samples' original order, so they do not depend on the number of ranks.
"""

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from iwm_fast.runtime.distributed import RankInfo, all_gather

PADDING = -1


def local_share(samples: Int64[np.ndarray, "samples"], rank_info: RankInfo) -> Int64[np.ndarray, "share"]:
    """Return every world_size-th sample, starting at this rank's number, padded to the size of the largest share."""
    local = samples[rank_info.rank :: rank_info.world_size]
    return np.pad(local, (0, -(-len(samples) // rank_info.world_size) - len(local)), constant_values=PADDING)


def drop_padding(share: Int64[np.ndarray, "share"]) -> Int64[np.ndarray, "samples"]:
    """Return the samples of a share that have to be computed, without its padding."""
    return share[share != PADDING]


def gather_in_order(
    share: Int64[np.ndarray, "share"], values: Shaped[Tensor, "real *rest"], rank_info: RankInfo
) -> Shaped[Tensor, "samples *rest"]:
    """Return the values of all ranks in the order of the samples before they were shared.

    Collective: every rank must call it.

    Args:
        share: this rank's share, as returned by `local_share`.
        values: one row for each sample of the share, without padding.
        rank_info: which process of the launch this is.
    """
    padded = values.new_zeros(len(share), *values.shape[1:])
    padded[: len(values)] = values
    by_rank = all_gather(padded.flatten()).view(rank_info.world_size, *padded.shape)
    is_real = all_gather(torch.from_numpy(share != PADDING).to(values.device, torch.uint8)).view(len(by_rank), -1)
    # Row r of rank k is sample number r * world_size + k, so transposing restores the samples' order.
    return by_rank.transpose(0, 1).flatten(0, 1)[is_real.T.flatten().bool()]
