"""Mean intersection over union and pixel accuracy, from three numbers of pixels for each image and class.

Numbers of single images are kept, because they add up: over ranks, over images, and over images drawn anew for
intervals. They are the diagonal and both margins of an image's confusion matrix.
"""

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Integer
from torch import Tensor

from iwm_fast.evals.results import NUM_RESAMPLES
from iwm_fast.pipelines.config import check

# draws of a bootstrap that are in memory at once: 64 of 100,000 images are 50 MB
_DRAWS = 64


def pixel_counts(
    predicted: Integer[Tensor, "B H W"], mask: Integer[Tensor, "B H W"], num_classes: int, ignore_index: int
) -> Int64[Tensor, "B 3 K"]:
    """Count each image's pixels of each class: those of it and found to be, those found to be, those of it.

    Args:
        predicted: class of each pixel, 0 .. K - 1.
        mask: the right one; pixels of `ignore_index` are not counted at all.
        num_classes: K.
        ignore_index: mask value that stands for no class.
    """
    num_images = len(mask)
    first = num_classes * torch.arange(num_images, device=mask.device)[:, None, None]
    # into a bin behind the last, which is cut off
    nowhere, is_counted = num_images * num_classes, mask != ignore_index
    is_right = is_counted & (predicted == mask)
    parts = [(mask, is_right), (predicted, is_counted), (mask, is_counted)]
    bins = [torch.where(which, number.long() + first, nowhere).flatten() for number, which in parts]
    counts = [torch.bincount(part, minlength=nowhere + 1)[:nowhere].view(num_images, num_classes) for part in bins]
    return torch.stack(counts, dim=1)


def mean_iou(counts: Int64[np.ndarray, "images 3 K"]) -> float:
    """Return the mean over the classes that occur of intersection over union, both of all images together.

    Raises:
        ValueError: if no pixel counts.
    """
    return float(_mean_iou(_require_some(counts.sum(axis=0))))


def class_iou(counts: Int64[np.ndarray, "images 3 K"]) -> list[float | None]:
    """Return each class's intersection over union, of all images together; None for a class that does not occur."""
    right, predicted, true = counts.sum(axis=0)
    union = np.maximum(predicted + true - right, 1)
    return [float(share) if occurs else None for share, occurs in zip(right / union, true > 0, strict=True)]


def pixel_accuracy(counts: Int64[np.ndarray, "images 3 K"]) -> float:
    """Return the share of the pixels, of all images together, whose class was found.

    Raises:
        ValueError: if no pixel counts.
    """
    right, _, true = _require_some(counts.sum(axis=0))
    return float(right.sum() / true.sum())


def guessed(counts: Int64[np.ndarray, "images 3 K"]) -> Int64[np.ndarray, "images 3 K"]:
    """Return the numbers of whoever calls every pixel by the most common class of all images."""
    true = counts[:, 2]
    guess = np.zeros_like(counts)
    common = true.sum(axis=0).argmax()
    guess[:, 0, common], guess[:, 1, common], guess[:, 2] = true[:, common], true.sum(axis=1), true
    return guess


def resampled_mean_iou(counts: Int64[np.ndarray, "images 3 K"], seed: int = 0) -> Float64[np.ndarray, "draws"]:
    """Return the mean IoU of images that are drawn anew with replacement, many times.

    A class that no drawn image shows does not enter that draw's mean. Another set of numbers for as many images is
    drawn alike, so that differences are those on the same images.
    """
    generator, num_images = np.random.default_rng(seed), len(counts)
    flat = counts.reshape(num_images, -1).astype(np.float64)
    found: list[np.ndarray] = []
    for first in range(0, NUM_RESAMPLES, _DRAWS):
        size = (min(_DRAWS, NUM_RESAMPLES - first), num_images)
        times = [np.bincount(draw, minlength=num_images) for draw in generator.integers(0, num_images, size)]
        found.append(_mean_iou((np.stack(times) @ flat).reshape(size[0], 3, -1)))
    return np.concatenate(found)


def interval(draws: Float64[np.ndarray, "draws"]) -> tuple[float, float]:
    """Return the middle 95 %; a draw of images without any pixel that counts says nothing."""
    low, high = np.nanquantile(draws, (0.025, 0.975))
    return float(low), float(high)


def _mean_iou(sums: Float[np.ndarray, "*draws 3 K"] | Int64[np.ndarray, "*draws 3 K"]) -> np.ndarray:
    right, predicted, true = np.moveaxis(sums, -2, 0)
    is_present = true > 0
    iou = np.where(is_present, right / np.maximum(predicted + true - right, 1), 0.0)
    num_present = is_present.sum(axis=-1)
    return np.where(num_present > 0, iou.sum(axis=-1) / np.maximum(num_present, 1), np.nan)


def _require_some(sums: Int64[np.ndarray, "3 K"]) -> Int64[np.ndarray, "3 K"]:
    check(bool(sums[2].any()), "masks", "only pixels of ignore_index", "show some class")
    return sums
