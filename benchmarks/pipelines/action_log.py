"""Cost of the action log: its own time per image, and a stream of our loader that writes a log."""

import dataclasses
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.harness.interleave import Stream
from benchmarks.harness.session import Case, Session
from benchmarks.pipelines.checks import first_batch
from benchmarks.pipelines.report import LOGGED, LOGGING
from benchmarks.pipelines.streams import Workload, loader_stream
from iwm_fast.pipelines.action_log.writer import GROUP_ROWS, ActionLog
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.transforms.composition import draw
from iwm_fast.training.loaders import log_metadata

NUM_ROWS = 4 * GROUP_ROWS
_GROUP_BATCHES = 8
"""Batches per row group of the logged stream: few, so that row groups are written during a round."""


def run(session: Session, workload: Workload, num_rows: int = NUM_ROWS) -> None:
    """Log a few thousand rows as fast as possible, and record the processor time and size per image."""
    batches = _synthetic_batches(workload, -(-num_rows // workload.batch_size))
    num_rows = len(batches) * workload.batch_size
    with TemporaryDirectory() as folder:
        log = open_log(workload, Path(folder), GROUP_ROWS)
        begin, cpu_begin = time.perf_counter(), time.process_time()
        for batch in batches:
            log.add(batch)
        log.publish()
        wall_s, cpu_s = time.perf_counter() - begin, time.process_time() - cpu_begin
        log.close()
        size = sum(path.stat().st_size for path in Path(folder).glob("*.parquet"))
    figures = {
        "rows": num_rows,
        "cpu_us_per_image": round(1e6 * cpu_s / num_rows, 2),
        "us_per_image": round(1e6 * wall_s / num_rows, 2),
        "bytes_per_image": round(size / num_rows, 1),
    }
    session.record(Case(LOGGING, workload.shape), LOGGED, figures=figures)


def _synthetic_batches(workload: Workload, count: int) -> list[Batch]:
    """Return copies of one batch in which all logged fields are random, because repeated values compress too well."""
    template, slots = first_batch(loader_stream(workload)), np.arange(workload.batch_size)
    generator, last = torch.Generator().manual_seed(0), workload.shards.num_samples - 1
    batches = []
    for step in range(count):
        window = 1 + (500 * torch.rand(workload.batch_size, 4, generator=generator)).floor()
        sample = torch.randint(0, last, (workload.batch_size,), generator=generator)
        fields = {"draws": draw(workload.views, 0, step, slots), "crop_window": window, "source_window": window}
        fields |= {"sample": sample, "scheduled_sample": sample}
        key = tuple(workload.shards.key(number) for number in sample.tolist())
        batches.append(dataclasses.replace(template, step=step, key=key, **fields))
    return batches


def logged_stream(workload: Workload) -> Stream:
    """Return our loader with an action log of its batches, as in a training run."""
    stream = loader_stream(workload)

    def start() -> Iterator[Batch]:
        group_rows = _GROUP_BATCHES * workload.batch_size
        with (
            stream.open() as loader,
            TemporaryDirectory() as folder,
            closing(open_log(workload, Path(folder), group_rows)) as log,
        ):
            yield from map(log.add, loader)

    return stream._replace(start=start)


def open_log(workload: Workload, folder: Path, group_rows: int) -> ActionLog:
    """Open the log of a single process."""
    head = log_metadata(workload.config(), workload.shards)
    return ActionLog(folder, head=head, shards=workload.shards, rank=0, group_rows=group_rows)
