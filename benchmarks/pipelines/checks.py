"""Checks before anything is timed: that all streams do the same work."""

import zlib
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from benchmarks.harness.interleave import Stream
from benchmarks.harness.session import WrongResultError
from benchmarks.pipelines.report import OURS
from benchmarks.pipelines.streams import Workload
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.transforms.normalization import denormalize_view

MEAN_DIFFERENCE, LARGEST_DIFFERENCE = 1.0, 12.0
"""Grey levels: what decoders and antialiased resizing differ by, on average and at the 99th percentile."""


def check_readers(readers: Mapping[str, Stream], num_samples: int) -> None:
    """Check that each reader hands out every image of the shards once in as many images as there are.

    Raises:
        WrongResultError: if one does not.
    """
    read = {name: _first_epoch(stream, num_samples) for name, stream in readers.items()}
    for name, images in read.items():
        if images != read[OURS] or max(images.values()) > 1:
            twice = sum(times - 1 for times in images.values())
            raise WrongResultError(f"reading: {name} does not read every image once; {twice} came more than once")


def _first_epoch(stream: Stream, num_samples: int) -> Counter[int]:
    with stream.open() as batches:
        images = (image for batch in batches for image in batch)
        return Counter(zlib.crc32(image) for image in islice(images, num_samples))


def check_views(ours: Batch, twin: Batch) -> dict[str, float]:
    """Check that our loader makes what its plain twin makes of the same samples; return by how much pixels differ.

    Raises:
        WrongResultError: if samples or actions differ, or pixels by more than decoders do.
    """
    is_same = ours.key == twin.key and torch.equal(ours.action.cpu(), twin.action.cpu())
    differences = {name: _difference(ours, twin, name) for name in ("source_view", "target_view")}
    figures = {"mean_difference": round(max(float(one.mean()) for one in differences.values()), 3)}
    figures["p99_difference"] = max(float(np.percentile(one, 99)) for one in differences.values())
    if not is_same:
        raise WrongResultError("two views: our loader and its twin show other samples or tell another action")
    # written so that NaN fails
    if not (figures["mean_difference"] < MEAN_DIFFERENCE and figures["p99_difference"] <= LARGEST_DIFFERENCE):
        raise WrongResultError(
            f"two views: our loader's pixels differ from its twin's by {figures['mean_difference']} grey levels on "
            f"average and {figures['p99_difference']:.0f} at the 99th percentile; run pytest tests/pipelines"
        )
    return figures


def _difference(ours: Batch, twin: Batch, name: str) -> np.ndarray:
    pixels = [denormalize_view(getattr(batch, name)).cpu().numpy().astype(np.int16) for batch in (ours, twin)]
    return np.abs(pixels[0] - pixels[1])


def check_shapes(stream: Stream, name: str, workload: Workload) -> None:
    """Check that a stream hands out batches of two normalised views of the size asked for.

    Raises:
        WrongResultError: if it does not.
    """
    batch = first_batch(stream)
    views = (batch.source_view, batch.target_view) if isinstance(batch, Batch) else batch
    wanted = (workload.batch_size, 3, workload.views.size, workload.views.size)
    for view in views:
        # uniform pixels have a deviation of one third of the range, normalised ones of about 1
        is_normalized = view.dtype == torch.float32 and 0.3 < float(view.std()) < 3 and float(view.min()) < 0
        if tuple(view.shape) != wanted or len(views) != 2 or not is_normalized:
            raise WrongResultError(f"two views: {name} makes {len(views)} views, one {tuple(view.shape)} {view.dtype}")
    if torch.equal(views[0], views[1]):
        raise WrongResultError(f"two views: {name} shows the same image twice")


def check_stage(stage: str, stream: Stream, workload: Workload) -> None:
    """Check that a stage of our graph hands out whole images, or crops of the views' size.

    Raises:
        WrongResultError: if it does not.
    """
    (pixels,) = first_batch(stream)
    size = workload.views.size
    whole = (workload.photographs.height, workload.photographs.width)
    wanted = (*(whole if stage == "decode" else (size, size)), 3)
    shapes = {tuple(shape) for shape in pixels.shape()}
    if shapes != {wanted} or len(pixels) != workload.batch_size:
        raise WrongResultError(f"{stage}: {len(pixels)} images of {shapes}, not {workload.batch_size} of {wanted}")


def first_batch(stream: Stream) -> Any:
    """Return the first batch of a stream."""
    with stream.open() as batches:
        batch = next(batches)
        # on a GPU it is still being made
        stream.take(batch)
        return batch
