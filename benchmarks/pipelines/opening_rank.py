"""A rank of dataset_opening.py: opens a data set and draws a batch, whenever it is asked to; imports no torch.

Each line of standard input is `open PATTERN`, or `map` and a pickled set in hexadecimal digits. Each answer is the
pickled set and the number of bytes by which this process has grown.
"""

import pickle
import sys
from pathlib import Path

import numpy as np

from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards

_BATCH_SIZE = 1024


def main() -> None:
    """Answer requests until standard input ends."""
    before = _private_bytes()
    print("started", flush=True)
    for line in sys.stdin:
        kind, _, request = line.strip().partition(" ")
        shards: ShardSet = open_shards(request) if kind == "open" else pickle.loads(bytes.fromhex(request))
        samples = SampleOrder(np.diff(shards.shard_bounds), 0, 16).samples_at(np.arange(_BATCH_SIZE))
        _ = shards.labels(samples), [shards.key(sample) for sample in samples.tolist()]
        print(pickle.dumps(shards).hex(), _private_bytes() - before, flush=True)


def _private_bytes() -> int:
    """Return the memory of this process that no file backs."""
    text = Path("/proc/self/smaps_rollup").read_text(encoding="utf-8")
    return 1024 * int(text.partition("Anonymous:")[2].split()[0])


if __name__ == "__main__":
    main()
