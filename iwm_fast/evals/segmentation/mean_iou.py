"""Mean intersection over union (IoU) and pixel accuracy, from three pixel counts for each image and class.

The counts are the diagonal and both margins of an image's confusion matrix. They are kept for single images because
they are additive: over ranks, over images, and over the resampled images of a bootstrap.
"""

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Integer
from torch import Tensor

from iwm_fast.evals.results import NUM_RESAMPLES

# Bootstrap draws that are in memory at a time: 64 draws of 100,000 images take 50 MB.
_DRAWS_PER_CHUNK = 64


def count_pixels(
    predicted: Integer[Tensor, "B H W"], mask: Integer[Tensor, "B H W"], num_classes: int, ignore_index: int
) -> Int64[Tensor, "B 3 K"]:
    """Count the pixels of each class in each image: correctly predicted pixels, predicted pixels, true pixels.

    Args:
        predicted: predicted class of each pixel, 0 .. K - 1.
        mask: true class of each pixel; pixels with `ignore_index` are not counted.
        num_classes: K.
        ignore_index: mask value of pixels without a class.
    """
    num_images = len(mask)
    first_bin = num_classes * torch.arange(num_images, device=mask.device)[:, None, None]
    # Pixels that are not counted go to an additional last bin, which is dropped.
    last_bin, is_counted = num_images * num_classes, mask != ignore_index
    is_correct = is_counted & (predicted == mask)
    selections = [(mask, is_correct), (predicted, is_counted), (mask, is_counted)]
    bins = [torch.where(selected, number.long() + first_bin, last_bin).flatten() for number, selected in selections]
    counts = [torch.bincount(index, minlength=last_bin + 1)[:last_bin].view(num_images, num_classes) for index in bins]
    return torch.stack(counts, dim=1)


def mean_iou(counts: Int64[np.ndarray, "images 3 K"]) -> float:
    """Return the mean IoU over the classes that occur, where intersections and unions are summed over all images.

    Raises:
        ValueError: if all pixels are ignored.
    """
    return float(_mean_iou(_require_counted(counts.sum(axis=0))))


def class_iou(counts: Int64[np.ndarray, "images 3 K"]) -> list[float | None]:
    """Return the IoU of each class, summed over all images; None for a class that does not occur."""
    correct, predicted, true = counts.sum(axis=0)
    union = np.maximum(predicted + true - correct, 1)
    return [float(iou) if occurs else None for iou, occurs in zip(correct / union, true > 0, strict=True)]


def pixel_accuracy(counts: Int64[np.ndarray, "images 3 K"]) -> float:
    """Return the share of the pixels of all images whose class was predicted correctly.

    Raises:
        ValueError: if all pixels are ignored.
    """
    correct, _, true = _require_counted(counts.sum(axis=0))
    return float(correct.sum() / true.sum())


def majority_baseline(counts: Int64[np.ndarray, "images 3 K"]) -> Int64[np.ndarray, "images 3 K"]:
    """Return the counts of a baseline that predicts the most common class of all images for every pixel."""
    true = counts[:, 2]
    baseline = np.zeros_like(counts)
    majority = true.sum(axis=0).argmax()
    baseline[:, 0, majority], baseline[:, 1, majority], baseline[:, 2] = true[:, majority], true.sum(axis=1), true
    return baseline


def resampled_mean_iou(counts: Int64[np.ndarray, "images 3 K"], seed: int = 0) -> Float64[np.ndarray, "draws"]:
    """Return the mean IoU of bootstrap draws, each of which draws the images again with replacement.

    A draw's mean is over the classes that its images contain, so that draws are biased if classes are rare;
    `percentile_interval` removes this bias. The draws depend only on the seed and the number of
    images, so the difference of two results with the same seed compares the same images.
    """
    generator, num_images = np.random.default_rng(seed), len(counts)
    flat = counts.reshape(num_images, -1).astype(np.float64)
    chunks: list[np.ndarray] = []
    for first in range(0, NUM_RESAMPLES, _DRAWS_PER_CHUNK):
        size = (min(_DRAWS_PER_CHUNK, NUM_RESAMPLES - first), num_images)
        repeats = [np.bincount(draw, minlength=num_images) for draw in generator.integers(0, num_images, size)]
        chunks.append(_mean_iou((np.stack(repeats) @ flat).reshape(size[0], 3, -1)))
    return np.concatenate(chunks)


def percentile_interval(draws: Float64[np.ndarray, "draws"], value: float) -> tuple[float, float]:
    """Return the central 95 % interval of bootstrap draws after subtracting their bias, the mean draw minus `value`.

    Draws that lack a rare class which is segmented badly have a higher mean IoU, so that without this correction the
    interval can lie above the value itself. Draws whose pixels are all ignored (NaN) are left out.
    """
    low, high = np.nanquantile(draws - (np.nanmean(draws) - value), (0.025, 0.975))
    return float(low), float(high)


def _mean_iou(sums: Float[np.ndarray, "*draws 3 K"] | Int64[np.ndarray, "*draws 3 K"]) -> np.ndarray:
    correct, predicted, true = np.moveaxis(sums, -2, 0)
    # Classes without true pixels do not enter the mean, so that the value of their IoU does not matter.
    occurs = true > 0
    iou = np.where(occurs, correct / np.maximum(predicted + true - correct, 1), 0.0)
    num_classes = occurs.sum(axis=-1)
    return np.where(num_classes > 0, iou.sum(axis=-1) / np.maximum(num_classes, 1), np.nan)


def _require_counted(sums: Int64[np.ndarray, "3 K"]) -> Int64[np.ndarray, "3 K"]:
    if not sums[2].any():
        raise ValueError("masks contain only pixels with ignore_index; at least one pixel must have a class")
    return sums
