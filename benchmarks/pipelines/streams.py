"""Streams of the stages of our data pipeline, from encoded images to two views."""

from collections import deque
from collections.abc import Generator, Iterator, Sized
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.harness.interleave import Stream, StreamBudget
from benchmarks.harness.photograph_shards import PhotographShards
from benchmarks.pipelines.dali_baselines import build_stage, run_forever
from iwm_fast.config.run import OptimConfig, RunConfig, RuntimeConfig
from iwm_fast.pipelines.config import Backend, DataConfig
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.transforms.composition import ViewConfig, draw
from iwm_fast.pipelines.transforms.dali_graph import GraphSettings, crop_parameters
from iwm_fast.pipelines.transforms.geometry import view_windows
from iwm_fast.pipelines.transforms.image_decoding import dali_input
from iwm_fast.runtime.distributed import single_process
from iwm_fast.training.loaders import training_loader

READ_AHEAD = 4
"""Batches whose encoded images are read in advance, as with the default settings."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The work that all streams of a comparison do."""

    folder: Path
    """Folder in which the shards are stored."""
    photographs: PhotographShards
    views: ViewConfig
    batch_size: int
    threads: int
    """Decoding threads of DALI and workers of a DataLoader, one per core."""
    device: torch.device
    budget: StreamBudget

    @cached_property
    def pattern(self) -> str:
        """Pattern of the shards, which are written on first access."""
        return self.photographs.write(self.folder)

    @cached_property
    def shards(self) -> ShardSet:
        """The indexed shards."""
        return open_shards(self.pattern)

    @property
    def shape(self) -> dict[str, int | str]:
        """The properties that all streams have in common, for records."""
        size = np.concatenate([shard.image_size for shard in self.shards.shards]).mean()
        image = f"{self.photographs.width}x{self.photographs.height}, {size / 1e3:.0f} KB"
        return {"B": self.batch_size, "threads": self.threads, "image": image, "view": self.views.size}

    @property
    def graph_settings(self) -> GraphSettings:
        """Settings of the DALI graphs that run without a loader."""
        return GraphSettings(
            views=self.views,
            max_batch_size=self.batch_size,
            num_threads=self.threads,
            prefetch=2,
            device_id=self.device.index or 0 if self.device.type == "cuda" else None,
        )

    def complete(self, images: Sized) -> int:
        """Wait until the GPU has computed a batch, which loaders return earlier; return its number of images."""
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        return len(images)

    def config(self, **runtime: Any) -> RunConfig:
        """Return the default settings of a training run, with one decoding thread per core."""
        batches = max(OptimConfig().global_batch_size // self.batch_size, 1)
        return RunConfig(
            data=DataConfig(train=self.pattern),
            views=self.views,
            # A loader draws masks for the complete global batch, so its size stays near the default.
            optim=OptimConfig(global_batch_size=batches * self.batch_size),
            runtime=RuntimeConfig(**{"loader_threads": self.threads, "micro_batch_size": self.batch_size, **runtime}),
        )


def loader_stream(workload: Workload, backend: Backend = "dali", **runtime: Any) -> Stream:
    """Return the loader as a training run builds it."""
    config = workload.config(loader=backend, **runtime)
    prefetched = config.runtime.prefetch + config.runtime.read_ahead if backend == "dali" else 1
    process = single_process(workload.device.type)
    return Stream(
        lambda: training_loader(config, workload.shards, process),
        lambda batch: workload.complete(batch.key),
        prefetched,
    )


def encoded_batches(workload: Workload, depth: int = READ_AHEAD) -> Generator[list[np.ndarray]]:
    """Yield batches of encoded images in the training order, reading `depth` batches ahead."""
    config, size = workload.config(), workload.batch_size
    sizes = [len(shard.keys) for shard in workload.shards.shards]
    order = SampleOrder(sizes, config.seed, config.data.shuffle_window)
    with Reader(workload.shards, num_threads=config.runtime.reader_threads) as reader:
        pending = deque()
        for first in count(0, size):
            pending.append(reader.submit(order.samples_at(np.arange(first, first + size))))
            if len(pending) > depth:
                yield pending.popleft().result()


def reader_stream(workload: Workload) -> Stream:
    """Return the reader alone, in the training order."""
    return Stream(lambda: encoded_batches(workload), touch_pages, prefetched=READ_AHEAD)


def touch_pages(images: list[np.ndarray]) -> int:
    """Read one byte per memory page, so that memory-mapped images are really loaded; return the number of images."""
    for image in images:
        # Only one byte per 4 KB, because loading is to be measured and not this loop.
        image[::4096].max()
    return len(images)


def stage_stream(workload: Workload, stage: str) -> Stream:
    """Return the reader followed by the first stages of our graph, "decode" or "crop"."""

    def start() -> Iterator[Any]:
        with closing(encoded_batches(workload)) as encoded:
            if stage == "decode":
                inputs = ((images,) for images in encoded)
            else:
                inputs = (crop_inputs(workload, step, images) for step, images in enumerate(encoded))
            yield from run_forever(build_stage(stage, workload.graph_settings, lambda: next(inputs)))

    return Stream(start, lambda outputs: len(outputs[0]), prefetched=READ_AHEAD)


def crop_inputs(workload: Workload, step: int, images: list[np.ndarray]) -> tuple[Any, ...]:
    """Return the inputs of the graph that decodes crops, for the images of a step."""
    draws = draw(workload.views, 0, step, np.arange(len(images)))
    prepared = [dali_input(image) for image in images]
    windows = view_windows(draws, np.array([image.shape for image in prepared]))
    return [image.encoded for image in prepared], *crop_parameters(windows)
