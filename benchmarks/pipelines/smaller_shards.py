"""Images per second and bytes read, before and after `iwm shards resize`, for large and ordinary photographs."""

import dataclasses
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.harness import interleave
from benchmarks.harness.photograph_shards import PhotographShards, load_into_page_cache
from benchmarks.harness.session import Case, Session, WrongResultError
from benchmarks.pipelines.checks import first_batch, pixel_difference
from benchmarks.pipelines.report import OURS, SMALLER
from benchmarks.pipelines.streams import Workload, loader_stream
from iwm_fast.pipelines.config import ResizeConfig
from iwm_fast.pipelines.resize_shards import ResizedShard, resize_shards
from iwm_fast.pipelines.storage.shard_set import find_shards

SIZES = {(4000, 3000): 384, (2048, 1536): 384, (500, 375): 256}
"""Shorter side after resizing, by width and height before."""
_NUM_SHARDS, _SAMPLES_PER_SHARD, _BATCH = 4, 16, 16
# Of 255. Crops begin at complete pixels, which are others in the smaller image.
_MAX_DIFFERENCE = 8.0


@dataclass(frozen=True, kw_only=True)
class SmallerPhotographs(PhotographShards):
    """The same photographs in a smaller size."""

    shorter: int

    def write(self, folder: Path) -> str:
        """Write the shards and resize them, unless that is done, and return the pattern of the resized ones."""
        source = super().write(folder)
        destination = Path(f"{source}-shorter-{self.shorter}")
        _require_all_resized(list(resize_shards(find_shards(source), destination, ResizeConfig(shorter=self.shorter))))
        return str(destination)


def run(session: Session, workload: Workload, sizes: dict[tuple[int, int], int] = SIZES) -> None:
    """Write shards of each size, resize them, and measure two views from both in turns."""
    for (width, height), shorter in sizes.items():
        name = f"{SMALLER}: {width}x{height}"
        if not session.has_time(name):
            return
        size = {"num_shards": _NUM_SHARDS, "samples_per_shard": _SAMPLES_PER_SHARD, "width": width, "height": height}
        photographs = {"before": PhotographShards(**size), "after": SmallerPhotographs(**size, shorter=shorter)}
        small = dataclasses.replace(workload, batch_size=min(_BATCH, workload.batch_size))
        workloads = {shards: dataclasses.replace(small, photographs=each) for shards, each in photographs.items()}
        rate = _resizing_rate(workloads["before"], shorter)
        _check(name, workloads)
        for each in workloads.values():
            load_into_page_cache(each.pattern)
        streams = {shards: loader_stream(each) for shards, each in workloads.items()}
        results = interleave.compare(streams, workload.budget, deadline=session.deadline_of(0.5))
        for shards, each in workloads.items():
            num_bytes = np.concatenate([shard.image_size for shard in each.shards.shards]).mean()
            shape = {"B": each.batch_size, "image": f"{width}x{height}", "shorter": shorter, "shards": shards}
            figures = {"kb_per_image": round(float(num_bytes) / 1e3, 1), "resized_per_s_per_core": rate}
            interleave.record(session, Case(SMALLER, shape), OURS, results[shards], **figures)


def _resizing_rate(workload: Workload, shorter: int) -> float:
    """Return how many images one process resizes per second of CPU time."""
    paths = find_shards(workload.pattern)[:1]
    with tempfile.TemporaryDirectory(dir=workload.folder) as folder:
        begin = time.process_time()
        resized = list(resize_shards(paths, Path(folder, "new"), ResizeConfig(shorter=shorter), num_processes=1))
        seconds = time.process_time() - begin
    _require_all_resized(resized)
    return round(resized[0].num_resized / seconds, 1)


def _require_all_resized(shards: list[ResizedShard]) -> None:
    for shard in shards:
        if shard.num_copied or shard.left_out or shard.refusal or not shard.num_resized:
            raise WrongResultError(f"{SMALLER}: not all images are resized: {shard}")


def _check(name: str, workloads: dict[str, Workload]) -> None:
    """Raise WrongResultError if the views of the same samples differ."""
    before, after = (first_batch(loader_stream(workload)) for workload in workloads.values())
    difference = float(pixel_difference(before, after, "target_view").mean())
    # The negated comparison is also true for NaN.
    if before.key != after.key or not difference < _MAX_DIFFERENCE:
        raise WrongResultError(f"{name}: views of the resized images differ by {difference:.1f} grey levels on average")
