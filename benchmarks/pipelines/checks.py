"""Checks that all streams do the same work, before they are timed."""

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
from iwm_fast.pipelines.config import IMAGENET
from iwm_fast.pipelines.transforms.composition import draw
from iwm_fast.pipelines.transforms.geometry import crop_window
from iwm_fast.pipelines.transforms.normalization import denormalize_view

MAX_MEAN_DIFFERENCE, MAX_P99_DIFFERENCE = 1.0, 12.0
"""Grey levels by which decoders and antialiased resizing may differ, on average and at the 99th percentile."""


def check_readers(readers: Mapping[str, Stream], num_samples: int) -> None:
    """Raise WrongResultError unless the first `num_samples` images of each reader contain every image exactly once."""
    counts = {name: _count_images(stream, num_samples) for name, stream in readers.items()}
    for name, images in counts.items():
        if images != counts[OURS] or max(images.values()) > 1:
            repeated = sum(count - 1 for count in images.values())
            raise WrongResultError(f"reading: {name} does not read every image exactly once; {repeated} were repeated")


def _count_images(stream: Stream, num_samples: int) -> Counter[int]:
    """Return how often each image, identified by its checksum, is among the first ones of a stream."""
    with stream.open() as batches:
        images = (image for batch in batches for image in batch)
        return Counter(zlib.crc32(image) for image in islice(images, num_samples))


def check_views(ours: Batch, twin: Batch) -> dict[str, float]:
    """Check that the DALI loader and the PyTorch loader ("twin") return the same batch; return how much pixels differ.

    Raises:
        WrongResultError: if samples or actions differ, or pixels by more than decoders may.
    """
    is_same = ours.key == twin.key and torch.equal(ours.action.cpu(), twin.action.cpu())
    differences = [pixel_difference(ours, twin, name) for name in ("source_view", "target_view")]
    figures = {"mean_difference": round(max(float(pixels.mean()) for pixels in differences), 3)}
    figures["p99_difference"] = max(float(np.percentile(pixels, 99)) for pixels in differences)
    if not is_same:
        raise WrongResultError("two views: our loader and its twin return different samples or different actions")
    # The negated comparison is also true for NaN.
    if not (figures["mean_difference"] < MAX_MEAN_DIFFERENCE and figures["p99_difference"] <= MAX_P99_DIFFERENCE):
        raise WrongResultError(
            f"two views: our loader's pixels differ from its twin's by {figures['mean_difference']} grey levels on "
            f"average and {figures['p99_difference']:.0f} at the 99th percentile; run pytest tests/pipelines"
        )
    return figures


def pixel_difference(first: Batch, second: Batch, view: str) -> np.ndarray:
    """Return by how many grey levels the pixels of "source_view" or "target_view" of two batches differ."""
    views = (denormalize_view(getattr(batch, view), IMAGENET) for batch in (first, second))
    return np.abs(np.subtract(*(pixels.cpu().numpy().astype(np.int16) for pixels in views)))


def check_shapes(stream: Stream, name: str, workload: Workload) -> None:
    """Raise WrongResultError unless the batches of a stream are pairs of normalised views of the right size."""
    batch = first_batch(stream)
    views = (batch.source_view, batch.target_view) if isinstance(batch, Batch) else batch
    expected = (workload.batch_size, 3, workload.views.size, workload.views.size)
    for view in views:
        # Normalised pixels have a standard deviation of about 1. In [0, 1] it is at most 0.5, and no value is negative.
        is_normalized = view.dtype == torch.float32 and 0.3 < float(view.std()) < 3 and float(view.min()) < 0
        if tuple(view.shape) != expected or len(views) != 2 or not is_normalized:
            kind = f"{tuple(view.shape)} {view.dtype}"
            raise WrongResultError(f"two views, normalised: {name} returns {len(views)} views, one of them {kind}")
    if torch.equal(views[0], views[1]):
        raise WrongResultError(f"two views: {name} returns the same view twice")


def check_stage(stage: str, stream: Stream, workload: Workload) -> None:
    """Raise WrongResultError unless "decode" returns full images, and "crop" returns the crops that are drawn."""
    (pixels,) = first_batch(stream)
    sizes = np.tile([workload.photographs.height, workload.photographs.width], (workload.batch_size, 1))
    if stage == "crop":
        draws = draw(workload.views, 0, 0, np.arange(workload.batch_size))
        sizes = crop_window(draws.crop, sizes)[:, 2:].astype(int)
    expected, shapes = [(*size, 3) for size in sizes.tolist()], [tuple(shape) for shape in pixels.shape()]
    if shapes != expected:
        raise WrongResultError(f"{stage}: {len(pixels)} images of {set(shapes)}, not of {set(expected)}")


def first_batch(stream: Stream) -> Any:
    """Return the first batch of a stream, completed."""
    with stream.open() as batches:
        batch = next(batches)
        # On a GPU the kernels that compute the batch may still be running.
        stream.consume(batch)
        return batch
