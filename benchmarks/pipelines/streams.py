"""The product's own streams, from encoded bytes to two views: what each stage of the data line costs."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.interleave import Stream, Turns
from benchmarks.harness.photograph_shards import PhotographShards
from benchmarks.pipelines.dali_baselines import build_stage
from iwm_fast.config.run import OptimConfig, RunConfig, RuntimeConfig
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import Backend, DataConfig, ViewConfig
from iwm_fast.pipelines.loader import Loader
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.transforms.parameters import draw
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.loaders import training_loader

AHEAD = 4
"""Batches whose bytes are read before they are asked for, as with the default settings."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every stream of a comparison does."""

    folder: Path
    """Where shards are kept."""
    photographs: PhotographShards
    views: ViewConfig
    batch_size: int
    threads: int
    """Decoding threads of DALI, and workers of a DataLoader: one for each core."""
    device: torch.device
    turns: Turns

    @cached_property
    def pattern(self) -> str:
        """The shards, written when they are first asked for."""
        return self.photographs.write(self.folder)

    @cached_property
    def shards(self) -> ShardSet:
        """The shards, indexed."""
        return open_shards(self.pattern)

    @property
    def shape(self) -> dict[str, int | str]:
        """What all streams have in common, for records."""
        size = np.concatenate([shard.image_size for shard in self.shards.shards]).mean()
        image = f"{self.photographs.width}x{self.photographs.height}, {size / 1e3:.0f} KB"
        return {"B": self.batch_size, "threads": self.threads, "image": image, "view": self.views.size}

    @property
    def device_id(self) -> int | None:
        """Number of the GPU for DALI, None on a CPU."""
        return self.device.index or 0 if self.device.type == "cuda" else None

    @property
    def rank_info(self) -> RankInfo:
        """A single process."""
        return RankInfo(rank=0, local_rank=0, world_size=1, device=self.device)

    def config(self, **runtime: Any) -> RunConfig:
        """Return a run's settings: the default ones, with all cores decoding."""
        largest = OptimConfig().global_batch_size
        batches = max(largest // self.batch_size, 1)
        return RunConfig(
            data=DataConfig(train=self.pattern),
            views=self.views,
            # masks are drawn for all of it, whatever the micro-batch is
            optim=OptimConfig(global_batch_size=batches * self.batch_size),
            runtime=RuntimeConfig(
                **{"loader_threads": self.threads, "micro_batch_size": self.batch_size, **runtime},
            ),
        )


def loader_stream(workload: Workload, backend: Backend = "dali", **runtime: Any) -> Stream:
    """Return what a training gets: the loader as a run builds it."""
    config = workload.config(loader=backend, **runtime)
    ahead = config.runtime.prefetch + config.runtime.read_ahead if backend == "dali" else 1

    @contextmanager
    def begin() -> Iterator[Loader]:
        loader = training_loader(config, workload.shards, workload.rank_info)
        try:
            yield loader
        finally:
            loader.close()

    return Stream(begin, lambda batch: take(batch, workload.device), ahead)


def take(batch: Batch, device: torch.device) -> int:
    """Wait until a batch is there, and return how many images are in it."""
    if device.type == "cuda":
        # without this the clock would stop at a promise
        torch.cuda.current_stream(device).synchronize()
    return len(batch.key)


class Ahead:
    """Encoded images of the training order, batch after batch, read some batches ahead."""

    def __init__(self, workload: Workload, depth: int = AHEAD) -> None:
        config = workload.config()
        sizes = [len(shard.keys) for shard in workload.shards.shards]
        self._order = SampleOrder(sizes, config.seed, config.data.shuffle_window)
        self._batch_size = workload.batch_size
        self.reader = Reader(workload.shards, num_threads=config.runtime.reader_threads)
        self._step = count()
        self._reading = deque(self._submit() for _ in range(depth))

    def _submit(self) -> Any:
        first = next(self._step) * self._batch_size
        return self.reader.submit(self._order.samples_at(np.arange(first, first + self._batch_size)))

    def __iter__(self) -> "Ahead":
        return self

    def __next__(self) -> list[np.ndarray]:
        self._reading.append(self._submit())
        return self._reading.popleft().result()


def reader_stream(workload: Workload) -> Stream:
    """Return the reader alone, in the training order."""

    @contextmanager
    def begin() -> Iterator[Ahead]:
        ahead = Ahead(workload)
        with ahead.reader:
            yield ahead

    return Stream(begin, touch, ahead=AHEAD)


def touch(images: list[np.ndarray]) -> int:
    """Look at each page of each image, so that one that was only promised is read; return how many images there are."""
    for image in images:
        # as cheap as a look can be: the reading is to be measured
        image[::4096].max()
    return len(images)


def stage_stream(workload: Workload, stage: str) -> Stream:
    """Return the reader with the graph's first stages behind it: "decode" or "crop"."""

    @contextmanager
    def begin() -> Iterator[Iterator[Any]]:
        ahead = Ahead(workload)
        with ahead.reader:
            feed = _feed(workload, ahead, stage)
            yield runs(build_stage(stage, workload.views, feed, _graph_size(workload)).run)

    return Stream(begin, lambda outputs: len(outputs[0]), ahead=AHEAD)


def _graph_size(workload: Workload) -> dict[str, Any]:
    return {
        "batch_size": workload.batch_size,
        "num_threads": workload.threads,
        "device_id": workload.device_id,
        "prefetch_queue_depth": 2,
    }


def _feed(workload: Workload, ahead: Ahead, stage: str) -> Callable[[], tuple[Any, ...]]:
    step = count()

    def feed() -> tuple[Any, ...]:
        if stage == "decode":
            return (next(ahead),)
        draws = draw(workload.views, 0, next(step), np.arange(workload.batch_size))
        return next(ahead), draws.crop

    return feed


def runs(run: Callable[[], Any]) -> Iterator[Any]:
    """Return what a graph's runs give, for ever."""
    while True:
        yield run()
