"""Search for memory leaks: resident memory of our loader over a few thousand batches.

The loader runs in a separate process, so that memory freed by other sections does not hide its growth.
"""

import dataclasses
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from benchmarks.harness.photograph_shards import PhotographShards
from benchmarks.harness.session import Case, Session
from benchmarks.pipelines.report import MEMORY, OURS
from benchmarks.pipelines.streams import Workload, loader_stream
from iwm_fast.monitoring.throughput import used_memory_mb

SETTLED = 100
"""Batches after which all buffers have reached their final size."""
NUM_BATCHES = 2000
_SMALL = PhotographShards(num_shards=2, samples_per_shard=64, width=120, height=90)
_VIEW, _BATCH = 64, 16


def run(session: Session, workload: Workload, num_batches: int = NUM_BATCHES, settled: int = SETTLED) -> None:
    """Record the growth of the loader's memory over many small batches of small images."""
    views = dataclasses.replace(workload.views, size=min(_VIEW, workload.views.size))
    small = dataclasses.replace(workload, photographs=_SMALL, views=views, batch_size=_BATCH)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        resident = pool.submit(measure_resident_mb, small, num_batches).result()
    session.record(Case(MEMORY, small.shape), OURS, figures=memory_figures(resident, settled))


def measure_resident_mb(workload: Workload, num_batches: int) -> list[float]:
    """Return the resident memory of this process in MB after each batch."""
    torch.set_num_threads(1)
    stream = loader_stream(workload)
    resident = []
    with stream.open() as batches:
        for _ in range(num_batches):
            stream.consume(next(batches))
            resident.append(used_memory_mb(torch.device("cpu")))
    return resident


def memory_figures(resident: list[float], settled: int) -> dict[str, float | int]:
    """Return megabytes after `settled` batches and at the end, growth in percent, and the slope of a fitted line."""
    first, last = resident[settled - 1], resident[-1]
    slope = np.polyfit(np.arange(settled - 1, len(resident)), resident[settled - 1 :], 1)[0]
    return {
        "batches": len(resident),
        "settled": settled,
        "first_mb": round(first, 1),
        "last_mb": round(last, 1),
        "largest_mb": round(max(resident), 1),
        "growth_percent": round(100 * (last / first - 1), 3),
        "slope_bytes_per_batch": round(1e6 * float(slope), 1),
    }
