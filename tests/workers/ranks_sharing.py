"""One rank of test_results.py: shares and joins samples of several numbers and kinds."""

import numpy as np
import torch

from iwm_fast.runtime import distributed
from iwm_fast.runtime.process import end_process
from iwm_fast.runtime.sharding import drop_padding, gather_in_order, local_share

# what each of three ranks has of 0, 10, 20, ...
SHARES = {
    1: [[0], [-1], [-1]],
    2: [[0], [10], [-1]],
    4: [[0, 30], [10, -1], [20, -1]],
    6: [[0, 30], [10, 40], [20, 50]],
}


def main(rank_info):
    for count in range(9):
        samples = np.arange(count, dtype=np.int64) * 10
        part = local_share(samples, rank_info)
        if count in SHARES:
            assert part.tolist() == SHARES[count][rank_info.rank], part
        for rest in ((), (2,), (2, 3), (2, 0)):
            for dtype in (torch.float32, torch.float64, torch.int64, torch.float16):
                whole = (torch.arange(count).view(-1, *[1] * len(rest)) + torch.zeros(rest) / 10).to(dtype)
                values = whole[torch.from_numpy(drop_padding(part)) // 10]
                joined = gather_in_order(part, values, rank_info)
                assert joined.dtype == dtype and torch.equal(joined, whole), (count, rest, joined)
    print("shares of 0 .. 8 samples joined")


if __name__ == "__main__":
    main(distributed.start("cpu"))
    distributed.stop()
    end_process()
