"""One rank of test_results.py: shares and joins samples of several numbers and kinds."""

import numpy as np
import torch
import torch.distributed as dist

from iwm_fast.runtime import distributed
from iwm_fast.runtime.error_reporting import end_process
from iwm_fast.runtime.sharding import join, real, share

# what each of three ranks has of 0, 10, 20, ...
SHARES = {
    1: [[0], [-1], [-1]],
    2: [[0], [10], [-1]],
    4: [[0, 30], [10, -1], [20, -1]],
    6: [[0, 30], [10, 40], [20, 50]],
}


def main():
    rank = dist.get_rank()
    for count in range(9):
        samples = np.arange(count, dtype=np.int64) * 10
        part = share(samples)
        if count in SHARES:
            assert part.tolist() == SHARES[count][rank], part
        for rest in ((), (2,), (2, 3), (2, 0)):
            for dtype in (torch.float32, torch.float64, torch.int64, torch.float16):
                whole = (torch.arange(count).view(-1, *[1] * len(rest)) + torch.zeros(rest) / 10).to(dtype)
                values = whole[torch.from_numpy(real(part)) // 10]
                joined = join(part, values)
                assert joined.dtype == dtype and torch.equal(joined, whole), (count, rest, joined)
    print("shares of 0 .. 8 samples joined")


if __name__ == "__main__":
    distributed.start("cpu")
    main()
    distributed.stop()
    end_process()
