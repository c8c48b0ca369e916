"""How many CPU cores decode a run's images fast enough: a measurement of a few seconds on the run's own shards."""

import math
import os
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from iwm_fast.config.run import RunConfig
from iwm_fast.pipelines.bad_samples import error_as_value
from iwm_fast.pipelines.errors import ShardError, UndecodableImageError
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.composition import draw
from iwm_fast.pipelines.transforms.geometry import view_windows
from iwm_fast.pipelines.transforms.image_decoding import DaliInput, dali_input

SECONDS = 3.0
"""Duration of the measurement."""
_BATCH_SIZE = 16


@dataclass(frozen=True, kw_only=True)
class DecodeRate:
    """How fast one core decodes and crops images."""

    images_per_s: float
    num_images: int
    """Number of images that were measured."""

    def cores_for(self, images_per_s: float) -> int:
        """Return how many cores decode this many images per second."""
        return math.ceil(images_per_s / self.images_per_s)

    def describe(self, images_per_s: float, ranks: int) -> str:
        """Return the cores that a training speed over all ranks needs, as text."""
        cores = ranks * self.cores_for(images_per_s / ranks)
        here = len(os.sched_getaffinity(0))
        return (
            f"{self.images_per_s:,.0f} images/s per core, measured on {self.num_images:,} of these images; with "
            f"runtime.decode=cpu, {images_per_s:,.0f} images/s need {cores:,} cores "
            f"(runtime.loader_threads={cores // ranks} per rank); this machine has {here:,}"
        )


def measure_decode_rate(config: RunConfig, shards: ShardSet) -> DecodeRate:
    """Decode and crop random samples in one thread, as the loader does on a CPU, and count CPU time, not waiting.

    Raises:
        ShardError: if none of the images that were tried can be decoded.
    """
    # DALI is imported here so that runs with the torch loader can be checked where it is not installed.
    from iwm_fast.pipelines.transforms.dali_graph import GraphSettings, build_graph, graph_parameters  # noqa: PLC0415

    settings = GraphSettings(
        views=config.views, max_batch_size=_BATCH_SIZE, num_threads=1, prefetch=1, device_id=None, output="crops"
    )
    inputs = ()
    graph = build_graph(settings, lambda: inputs)
    num_images, cpu_s, step, end = 0, 0.0, 0, time.monotonic() + SECONDS
    with Reader(shards, num_threads=1) as reader:
        # The first batch is not counted, since DALI starts threads and allocates memory for it.
        while time.monotonic() < end or step < 2:
            images = _random_images(reader, shards, step)
            draws = draw(config.views, config.seed, step, np.arange(len(images)))
            windows = view_windows(draws, np.array([image.shape for image in images]).reshape(-1, 2))
            inputs = ([image.encoded for image in images], *graph_parameters(draws, windows, settings))
            begin_cpu_s = time.process_time()
            if images and _is_rendered(graph) and step > 0:
                num_images, cpu_s = num_images + len(images), cpu_s + time.process_time() - begin_cpu_s
            step += 1
    if not num_images:
        raise ShardError(f"none of {step * _BATCH_SIZE} images could be decoded", remedy="run `iwm shards check`")
    return DecodeRate(images_per_s=num_images / cpu_s, num_images=num_images)


def _random_images(reader: Reader, shards: ShardSet, step: int) -> list[DaliInput]:
    """Return the images of a batch of random samples, without those whose headers are refused."""
    samples = np.random.default_rng(step).integers(0, shards.num_samples, _BATCH_SIZE)
    prepared = reader.read(samples, error_as_value(partial(dali_input, max_pixels=shards.max_pixels)))
    return [image for image in prepared if not isinstance(image, UndecodableImageError)]


def _is_rendered(graph: Any) -> bool:
    """Render the next batch; return False if one of its images cannot be decoded."""
    try:
        graph.run()
    except RuntimeError:
        return False
    return True
