"""A sheet of validation images, their maps, and what each arm makes of them."""

import colorsys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer, UInt8

from iwm_fast.evals.segmentation.mean_iou import pixel_accuracy
from iwm_fast.rendering.image_grid import Panel, save_sheet

# successive hues far from each other, however many classes there are
_GOLDEN = 0.618


@dataclass(frozen=True, kw_only=True)
class Shown:
    """Some validation images as the arms see them."""

    pixels: UInt8[np.ndarray, "B H W 3"]
    mask: UInt8[np.ndarray, "B H W"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What an arm makes of these images."""

    classes: Integer[np.ndarray, "B H W"]
    counts: Int64[np.ndarray, "B 3 K"]
    """See `iwm_fast.evals.segmentation.mean_iou.pixel_counts`."""
    mean_iou: float
    """Of all validation images."""


def save_picture(path: Path, shown: Shown, answers: dict[str, Answer], ignore_index: int, title: str) -> None:
    """Draw one column for each image: the image, its map, and the classes each arm finds, with the share of them."""
    rows = [
        [Panel(pixels=one) for one in shown.pixels],
        [Panel(pixels=one) for one in paint(shown.mask, ignore_index)],
    ]
    labels = ["image", "map"]
    for name, answer in answers.items():
        labels.append(f"{name.replace('_', ' ')}, mean IoU {answer.mean_iou:.2f}")
        pairs = zip(paint(answer.classes), answer.counts, strict=True)
        rows.append([Panel(pixels=painted, caption=_share(counts)) for painted, counts in pairs])
    save_sheet(path, labels, rows, title)


def _share(counts: Int64[np.ndarray, "3 K"]) -> str:
    # an image's own mean IoU would say little: one pixel of a class that is missed halves it
    return f"{pixel_accuracy(counts[None]):.0%} of the pixels" if counts[2].any() else "no pixel counts"


def paint(classes: Integer[np.ndarray, "B H W"], ignore_index: int | None = None) -> UInt8[np.ndarray, "B H W 3"]:
    """Return the colours of classes, the same for each class in every picture; what is ignored is black."""
    hues = (np.arange(256) * _GOLDEN) % 1.0
    # neighbours on the circle of hues differ in brightness, too
    colours = [colorsys.hsv_to_rgb(hue, 0.65, 0.95 - 0.2 * (number % 3)) for number, hue in enumerate(hues)]
    table = np.round(np.array(colours) * 255).astype(np.uint8)
    if ignore_index is not None:
        table[ignore_index] = 0
    return table[classes]
