"""A rank of test_results.py: shares samples between ranks and gathers values of several shapes and dtypes."""

import numpy as np
import torch

from iwm_fast.runtime import distributed
from iwm_fast.runtime.process import end_process
from iwm_fast.runtime.sharding import drop_padding, gather_in_order, local_share

# The shares of three ranks, by the number of samples; samples are 0, 10, 20, ...
SHARES = {
    1: [[0], [-1], [-1]],
    2: [[0], [10], [-1]],
    4: [[0, 30], [10, -1], [20, -1]],
    6: [[0, 30], [10, 40], [20, 50]],
}


def main(rank_info):
    for count in range(9):
        samples = np.arange(count, dtype=np.int64) * 10
        share = local_share(samples, rank_info)
        if count in SHARES:
            assert share.tolist() == SHARES[count][rank_info.rank], share
        for rest in ((), (2,), (2, 3), (2, 0)):
            for dtype in (torch.float32, torch.float64, torch.int64, torch.float16):
                expected = (torch.arange(count).view(-1, *[1] * len(rest)) + torch.zeros(rest) / 10).to(dtype)
                values = expected[torch.from_numpy(drop_padding(share)) // 10]
                gathered = gather_in_order(share, values, rank_info)
                assert gathered.dtype == dtype and torch.equal(gathered, expected), (count, rest, gathered)
    print("shares of 0 .. 8 samples joined")


if __name__ == "__main__":
    main(distributed.start("cpu"))
    distributed.stop()
    end_process()
