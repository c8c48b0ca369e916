"""A rank of test_loaders.py: opens shards as one of two ranks on each of two machines."""

import socket
import sys
from dataclasses import replace

from iwm_fast.pipelines.config import DataConfig
from iwm_fast.pipelines.storage import shard_set
from iwm_fast.runtime import distributed
from iwm_fast.runtime.process import end_process
from iwm_fast.training.loaders import open_training_shards_on_all_ranks


def main(rank_info, spec):
    rank_info = replace(rank_info, local_rank=rank_info.rank % 2)
    machine = rank_info.rank // 2
    socket.gethostname = lambda: f"machine {machine}"
    searches, find = [], shard_set.find_shards
    shard_set.find_shards = lambda pattern: searches.append(pattern) or find(pattern)
    shards = open_training_shards_on_all_ranks(DataConfig(train=spec, max_samples=40), rank_info)
    assert len(searches) == (rank_info.local_rank == 0), searches
    found = distributed.gather_objects((shards.content_digest, shards.index.path, shards.num_samples))
    (digest,) = {digest for digest, _, _ in found}
    assert digest == shards.content_digest and {count for *_, count in found} == {40}
    paths = [path for _, path, _ in found]
    # Indexes in memory have paths of the process that made them.
    assert paths[0] == paths[1] and paths[2] == paths[3]
    assert (paths[0] == paths[2]) == (not paths[0].startswith("/proc")), paths
    if rank_info.rank == 0:
        print("in memory" if paths[0].startswith("/proc") else "on disk")


if __name__ == "__main__":
    main(distributed.start("cpu"), sys.argv[1])
    distributed.stop()
    end_process()
