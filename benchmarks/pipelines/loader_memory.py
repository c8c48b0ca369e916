"""Does the product's loader keep what it should give back? Resident memory over some thousand batches.

It runs in a process of its own, so that what others have left behind neither hides growth nor makes it look small.
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
"""Batches after which all buffers have their size."""
NUM_BATCHES = 2000
_SMALL = PhotographShards(num_shards=2, samples_per_shard=64, width=120, height=90)
_VIEW, _BATCH = 64, 16


def run(session: Session, workload: Workload, num_batches: int = NUM_BATCHES, settled: int = SETTLED) -> None:
    """Watch the loader's memory over many small batches of small images."""
    views = dataclasses.replace(workload.views, size=min(_VIEW, workload.views.size))
    small = dataclasses.replace(workload, photographs=_SMALL, views=views, batch_size=_BATCH)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        resident = pool.submit(watch, small, num_batches).result()
    session.note(Case(MEMORY, small.shape), OURS, figures=figures_of(resident, settled))


def watch(workload: Workload, num_batches: int) -> list[float]:
    """Return the megabytes in memory after each batch."""
    torch.set_num_threads(1)
    stream = loader_stream(workload)
    resident = []
    with stream.open() as batches:
        for _ in range(num_batches):
            stream.take(next(batches))
            resident.append(used_memory_mb(torch.device("cpu")))
    return resident


def figures_of(resident: list[float], settled: int) -> dict[str, float | int]:
    """Return megabytes at both ends, growth between in percent, and the slope in bytes per batch."""
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
