"""The loader of a training run on the benchmark's photographs."""

from pathlib import Path

from benchmarks.harness.photograph_shards import PhotographShards
from benchmarks.train_step.workload import StepWorkload
from iwm_fast.pipelines.loader import Loader
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.loaders import training_loader

_TINY = PhotographShards(num_shards=2, samples_per_shard=16, width=80, height=60)


def open_loader(folder: Path, workload: StepWorkload, rank_info: RankInfo) -> tuple[Loader, int]:
    """Return a loader of shards that are written on first use, and the number of batches that it prefetches."""
    photographs = _TINY if workload.views.size < 224 else PhotographShards()
    pattern = photographs.write(folder)
    config = workload.config(pattern)
    runtime = config.runtime
    return training_loader(config, open_shards(pattern), rank_info), runtime.prefetch + runtime.read_ahead
