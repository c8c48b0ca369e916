"""One evaluation on many ranks: each takes its share of the samples, all get the whole outcome, in order.

Shares are of equal size, as collectives want them: the last ones are filled up with `PADDING`, whose rows are dropped
when shares are joined. So the outcome on many ranks is that on one.
"""

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Int64, Shaped
from torch import Tensor

from iwm_fast.runtime.distributed import join_over_ranks

PADDING = -1


def share(samples: Int64[np.ndarray, "samples"]) -> Int64[np.ndarray, "share"]:
    """Return this rank's samples, every world_size-th one, filled up with PADDING to the size of the largest share."""
    rank, world_size = (dist.get_rank() if dist.is_initialized() else 0), _world_size()
    own = samples[rank::world_size]
    return np.pad(own, (0, -(-len(samples) // world_size) - len(own)), constant_values=PADDING)


def real(part: Int64[np.ndarray, "share"]) -> Int64[np.ndarray, "samples"]:
    """Return a share without its padding: what has to be computed."""
    return part[part != PADDING]


def join(part: Int64[np.ndarray, "share"], values: Shaped[Tensor, "real *rest"]) -> Shaped[Tensor, "samples *rest"]:
    """Return all ranks' values in the order that the samples had before they were shared; collective.

    Args:
        part: this rank's share, as `share` gave it.
        values: one row for each of its real samples.
    """
    padded = values.new_zeros(len(part), *values.shape[1:])
    padded[: len(values)] = values
    # told, because where there are no values their number does not tell
    ranks = join_over_ranks(padded.flatten()).view(_world_size(), *padded.shape)
    is_real = join_over_ranks(torch.from_numpy(part != PADDING).to(values.device, torch.uint8)).view(len(ranks), -1)
    # row r of rank k was sample number r * world_size + k
    return ranks.transpose(0, 1).flatten(0, 1)[is_real.T.flatten().bool()]


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1
