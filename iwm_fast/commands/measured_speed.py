"""How fast this machine reads, decodes and computes what a run needs, from measurements of a few seconds each."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch

from iwm_fast.config.run import RunConfig
from iwm_fast.engines.optimizer import build_optimizer
from iwm_fast.engines.torch_engine import TorchEngine
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.student import build_student, compute_dtype
from iwm_fast.monitoring.flops import training_flops
from iwm_fast.monitoring.run_summary import LimitingPart, describe_limit
from iwm_fast.monitoring.throughput import format_rate
from iwm_fast.pipelines.bad_samples import error_as_value
from iwm_fast.pipelines.errors import ShardError, UndecodableImageError
from iwm_fast.pipelines.loader import Loader
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.composition import draw
from iwm_fast.pipelines.transforms.geometry import view_windows
from iwm_fast.pipelines.transforms.image_decoding import DaliInput, dali_input
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.loaders import training_loader
from iwm_fast.training.objective import Objective
from iwm_fast.training.schedules import build_schedules
from iwm_fast.training.step import train_step
from iwm_fast.training.teacher import Teacher

SECONDS = 2.0
"""Duration of each measurement."""
BATCH_SIZE = 32
"""Images per batch of `open_loader`."""
_DECODED_AT_ONCE = 16
_READ_AT_ONCE, _MAX_READ = 100, 1000
# More would take a CPU core seconds, which does 30 to 100 GFLOP/s.
_MAX_STEP_IMAGES, _MAX_STEP_FLOPS = 64, 5e10


class Speed(NamedTuple):
    """How fast one rank does a part of training: an estimate from a short measurement."""

    part: LimitingPart
    images_per_s: float | None
    """None if it is not measured."""
    remark: str
    """How it was measured, or why it was not."""
    num_threads: int = 0
    """Cores of this machine that are busy with it."""

    def __str__(self) -> str:
        speed = "not measured" if self.images_per_s is None else f"about {format_rate(self.images_per_s)} images/s"
        return f"{self.part}: {speed}, {self.remark}"

    def on_shared_cores(self, num_ranks: int) -> "Speed":
        """Return the speed with this many ranks on this machine, whose cores may be fewer than their threads."""
        num_threads, cores = num_ranks * self.num_threads, len(os.sched_getaffinity(0))
        if self.images_per_s is None or num_threads <= cores:
            return self
        remark = f"{self.remark}; {num_ranks} x {self.num_threads} threads share {cores} cores"
        return self._replace(images_per_s=self.images_per_s * cores / num_threads, remark=remark)


def predict_limit(config: RunConfig, speeds: list[Speed], *, is_on_gpu: bool) -> str:
    """Return what will limit a run, as far as the speeds of its parts are known, and the setting to change."""
    known: dict[LimitingPart, float] = {
        speed.part: speed.images_per_s for speed in speeds if speed.images_per_s is not None
    }
    slowest, *others = sorted(known, key=known.__getitem__)
    limit = describe_limit(config, slowest, is_on_gpu=is_on_gpu)
    rate = f"about {format_rate(known[slowest])} images/s per rank"
    doubt = "" if "decoding" in known else "; not measured: decoding"
    if "computation" in known:
        following = "".join(f"; {part} {format_rate(known[part])}" for part in others)
        return f"this run will be limited by {limit} ({rate}{following}{doubt})"
    return f"where computation is faster than {rate}, this run will be limited by {limit}{doubt}"


def measure_reading(shards: ShardSet, num_threads: int) -> Speed:
    """Read images of the first shard, from the disk and not from the page cache if it is a local file."""
    path, end = shards.paths[0], min(int(shards.shard_bounds[1]), _MAX_READ)
    if "://" not in path:
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    num_images, num_bytes, began = 0, 0, time.perf_counter()
    with Reader(shards, num_threads) as reader:
        while num_images < end and (num_images == 0 or time.perf_counter() - began < SECONDS):
            samples = np.arange(num_images, min(num_images + _READ_AT_ONCE, end))
            num_bytes += sum(map(len, reader.read(samples)))
            num_images += len(samples)
    seconds = time.perf_counter() - began
    remark = f"{num_images:,} images of {path} at {num_bytes / seconds / 1e6:,.0f} MB/s"
    return Speed("reading", num_images / seconds, remark)


def open_loader(config: RunConfig, shards: ShardSet, device: torch.device, batch_size: int = BATCH_SIZE) -> Loader:
    """Open the stream of training batches of a run with one rank and another batch size."""
    return training_loader(_on_one_rank(config, batch_size), shards, _one_rank(device))


def _on_one_rank(config: RunConfig, batch_size: int) -> RunConfig:
    runtime = replace(config.runtime, micro_batch_size=None)
    return replace(config, optim=replace(config.optim, global_batch_size=batch_size), runtime=runtime)


def _one_rank(device: torch.device) -> RankInfo:
    return RankInfo(rank=0, local_rank=0, world_size=1, device=device)


def measure_rendering(config: RunConfig, shards: ShardSet, device: torch.device) -> Speed:
    """Decode and render images as the loader of a rank does on this device."""
    with closing(open_loader(config, shards, device)) as loader:
        # These have been rendered ahead.
        for _ in range(1 + config.runtime.prefetch):
            next(loader)
        count, began = 0, time.perf_counter()
        while count < 4 or time.perf_counter() - began < SECONDS:
            next(loader)
            count += 1
        speed = count * BATCH_SIZE / (time.perf_counter() - began)
    num_threads = config.runtime.loader_threads if config.runtime.loader == "dali" else 1
    remark = f"with rendering, by {config.runtime.loader} on {_count_threads(num_threads)}"
    return Speed("decoding", speed, remark, num_threads)


def decoding_speed(config: RunConfig, shards: ShardSet, rate: "DecodeRate | None", *, is_on_gpu: bool) -> Speed:
    """Return how fast a rank decodes, where that can be measured on CPU cores; `rate` is that of one core."""
    if not is_on_gpu or config.runtime.loader == "torch":
        return measure_rendering(config, shards, torch.device("cpu"))
    if config.runtime.decode == "gpu" or rate is None:
        return Speed("decoding", None, "because a GPU does it")
    num_threads = config.runtime.loader_threads
    return Speed("decoding", num_threads * rate.images_per_s, f"runtime.loader_threads={num_threads}", num_threads)


def computation_speed(config: RunConfig, shards: ShardSet, micro_batch_size: int, *, is_on_gpu: bool) -> Speed:
    """Return how fast a rank trains on a CPU, with PyTorch's engine and one batch in memory; not measured on a GPU.

    A micro-batch that would take seconds is made smaller.
    """
    flops = training_flops(config).total
    num_images = min(micro_batch_size, _MAX_STEP_IMAGES, int(_MAX_STEP_FLOPS / flops))
    if is_on_gpu or num_images < 1:
        reason = "a GPU does it" if is_on_gpu else f"{flops / 1e9:.3g} GFLOP per image take a core seconds"
        return Speed("computation", None, f"because {reason}; images_per_s=... takes a measured speed")
    device, config = torch.device("cpu"), _on_one_rank(config, num_images)
    student = build_student(config, REFERENCE)
    engine = TorchEngine(config, student, build_optimizer(student, config.optim), _one_rank(device))
    teacher = Teacher(student.encoder, compute_dtype(config))
    objective = Objective(config.objective, is_identity=config.model.predictor.depth == 0)
    schedules = build_schedules(config.optim, shards.num_samples)
    # The loader stays open, because the batch may lie in its memory. It renders a few batches ahead, then rests.
    with closing(open_loader(config, shards, device, num_images)) as loader, _threads_of_a_rank():
        batches, step, began = repeat(next(loader)), 0, 0.0
        while step < 3 or time.perf_counter() - began < SECONDS:
            # The first step allocates memory.
            began = time.perf_counter() if step == 1 else began
            train_step(engine, teacher, objective, batches, schedules, applied_steps=step, accumulation=1)
            step += 1
        speed, num_threads = (step - 1) * num_images / (time.perf_counter() - began), torch.get_num_threads()
    remark = f"steps of {num_images} images with runtime.engine=plain on {_count_threads(num_threads)}"
    return Speed("computation", speed, remark, num_threads)


def measure_parts(
    config: RunConfig,
    shards: ShardSet,
    micro_batch_size: int,
    rate: "DecodeRate | None",
    *,
    given_speed: float | None,
    is_on_gpu: bool,
) -> list[Speed]:
    """Return how fast a rank reads, decodes and, last, computes, which is not measured if its speed is given."""
    if given_speed is None:
        computation = computation_speed(config, shards, micro_batch_size, is_on_gpu=is_on_gpu)
    else:
        computation = Speed("computation", given_speed, "as images_per_s says")
    reading = measure_reading(shards, config.runtime.reader_threads)
    return [reading, decoding_speed(config, shards, rate, is_on_gpu=is_on_gpu), computation]


def _count_threads(count: int) -> str:
    return f"{count} thread{'s' if count > 1 else ''}"


@contextmanager
def _threads_of_a_rank() -> Iterator[None]:
    """Compute with as many threads as a rank on a CPU does."""
    before = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
            f"{format_rate(self.images_per_s)} images/s per core, measured on {self.num_images:,} of these images; "
            f"with runtime.decode=cpu, {format_rate(images_per_s)} images/s need {cores:,} cores "
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
        views=config.views, max_batch_size=_DECODED_AT_ONCE, num_threads=1, prefetch=1, device_id=None, output="crops"
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
        raise ShardError(f"none of {step * _DECODED_AT_ONCE} images could be decoded", remedy="run `iwm shards check`")
    return DecodeRate(images_per_s=num_images / cpu_s, num_images=num_images)


def _random_images(reader: Reader, shards: ShardSet, step: int) -> list[DaliInput]:
    """Return the images of a batch of random samples, without those whose headers are refused."""
    samples = np.random.default_rng(step).integers(0, shards.num_samples, _DECODED_AT_ONCE)
    prepared = reader.read(samples, error_as_value(partial(dali_input, max_pixels=shards.max_pixels)))
    return [image for image in prepared if not isinstance(image, UndecodableImageError)]


def _is_rendered(graph: Any) -> bool:
    """Render the next batch; return False if one of its images cannot be decoded."""
    try:
        graph.run()
    except RuntimeError:
        return False
    return True
