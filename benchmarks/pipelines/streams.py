"""The product's own streams, from encoded bytes to two views: what each stage of the data line costs."""

from collections import deque
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.interleave import Stream, Turns
from benchmarks.harness.photograph_shards import PhotographShards
from benchmarks.pipelines.dali_baselines import build_stage, runs
from iwm_fast.config.run import OptimConfig, RunConfig, RuntimeConfig
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import Backend, DataConfig, ViewConfig
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.transforms.dali_graph import GraphSettings
from iwm_fast.pipelines.transforms.parameters import draw
from iwm_fast.runtime.distributed import single_process
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
    def graph_settings(self) -> GraphSettings:
        """Settings of DALI graphs that are fed by hand."""
        return GraphSettings(
            views=self.views,
            max_batch_size=self.batch_size,
            num_threads=self.threads,
            prefetch=2,
            device_id=self.device.index or 0 if self.device.type == "cuda" else None,
        )

    def config(self, **runtime: Any) -> RunConfig:
        """Return a run's settings: the default ones, with all cores decoding."""
        batches = max(OptimConfig().global_batch_size // self.batch_size, 1)
        return RunConfig(
            data=DataConfig(train=self.pattern),
            views=self.views,
            # masks are drawn for all of it, whatever the micro-batch is
            optim=OptimConfig(global_batch_size=batches * self.batch_size),
            runtime=RuntimeConfig(**{"loader_threads": self.threads, "micro_batch_size": self.batch_size, **runtime}),
        )


def loader_stream(workload: Workload, backend: Backend = "dali", **runtime: Any) -> Stream:
    """Return what a training gets: the loader as a run builds it."""
    config = workload.config(loader=backend, **runtime)
    ahead = config.runtime.prefetch + config.runtime.read_ahead if backend == "dali" else 1

    def take(batch: Batch) -> int:
        if workload.device.type == "cuda":
            # without this the clock would stop at a promise
            torch.cuda.current_stream(workload.device).synchronize()
        return len(batch.key)

    process = single_process(workload.device.type)
    return Stream(lambda: training_loader(config, workload.shards, process), take, ahead)


def encoded_batches(workload: Workload, depth: int = AHEAD) -> Generator[list[np.ndarray]]:
    """Yield encoded images of the training order, batch after batch, read some batches ahead."""
    config, size = workload.config(), workload.batch_size
    sizes = [len(shard.keys) for shard in workload.shards.shards]
    order = SampleOrder(sizes, config.seed, config.data.shuffle_window)
    with Reader(workload.shards, num_threads=config.runtime.reader_threads) as reader:
        reading = deque()
        for first in count(0, size):
            reading.append(reader.submit(order.samples_at(np.arange(first, first + size))))
            if len(reading) > depth:
                yield reading.popleft().result()


def reader_stream(workload: Workload) -> Stream:
    """Return the reader alone, in the training order."""
    return Stream(lambda: encoded_batches(workload), touch, ahead=AHEAD)


def touch(images: list[np.ndarray]) -> int:
    """Look at each page of each image, so that one that was only promised is read; return how many images there are."""
    for image in images:
        # as cheap as a look can be: the reading is to be measured
        image[::4096].max()
    return len(images)


def stage_stream(workload: Workload, stage: str) -> Stream:
    """Return the reader with the graph's first stages behind it: "decode" or "crop"."""

    def start() -> Iterator[Any]:
        slots = np.arange(workload.batch_size)
        with closing(encoded_batches(workload)) as encoded:
            if stage == "decode":
                inputs = ((images,) for images in encoded)
            else:
                inputs = ((images, draw(workload.views, 0, step, slots).crop) for step, images in enumerate(encoded))
            yield from runs(build_stage(stage, workload.graph_settings, lambda: next(inputs)))

    return Stream(start, lambda outputs: len(outputs[0]), ahead=AHEAD)
