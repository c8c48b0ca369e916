"""One evaluation on many ranks: each takes its share of the samples, all get the whole outcome, in order.

Shares are of equal size, as collectives need them: the last ones are filled up with `PADDING`, whose rows are dropped
when shares are gathered. So the outcome on many ranks is that of one.
"""

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from iwm_fast.runtime.distributed import RankInfo, all_gather

PADDING = -1


def local_share(samples: Int64[np.ndarray, "samples"], rank_info: RankInfo) -> Int64[np.ndarray, "share"]:
    """Return this rank's samples, every world_size-th one, padded to the size of the largest share."""
    local = samples[rank_info.rank :: rank_info.world_size]
    return np.pad(local, (0, -(-len(samples) // rank_info.world_size) - len(local)), constant_values=PADDING)


def drop_padding(share: Int64[np.ndarray, "share"]) -> Int64[np.ndarray, "samples"]:
    """Return a share without its padding: what has to be computed."""
    return share[share != PADDING]


def gather_in_order(
    share: Int64[np.ndarray, "share"], values: Shaped[Tensor, "real *rest"], rank_info: RankInfo
) -> Shaped[Tensor, "samples *rest"]:
    """Return all ranks' values in the order that the samples had before they were shared; collective.

    Args:
        share: this rank's share, as `local_share` gave it.
        values: one row for each of its samples, without padding.
        rank_info: this process.
    """
    padded = values.new_zeros(len(share), *values.shape[1:])
    padded[: len(values)] = values
    ranks = all_gather(padded.flatten()).view(rank_info.world_size, *padded.shape)
    is_real = all_gather(torch.from_numpy(share != PADDING).to(values.device, torch.uint8)).view(len(ranks), -1)
    # row r of rank k was sample number r * world_size + k
    return ranks.transpose(0, 1).flatten(0, 1)[is_real.T.flatten().bool()]
