"""Figure of a segmentation: validation images, their segmentation maps, and the classes that each variant predicts."""

import colorsys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, Integer, UInt8

from iwm_fast.evals.segmentation.mean_iou import pixel_accuracy
from iwm_fast.rendering.image_grid import ImageGrid, Panel, save_image_grids

# Steps of the golden ratio around the colour circle keep the colours of any number of classes far apart.
_TURN = 0.618


@dataclass(frozen=True, kw_only=True)
class FigureImages:
    """The validation images of the figure, cropped as the networks see them."""

    pixels: UInt8[np.ndarray, "B H W 3"]
    mask: UInt8[np.ndarray, "B H W"]


@dataclass(frozen=True, kw_only=True)
class SegmentedImages:
    """A variant's predictions for the images of the figure."""

    classes: Integer[np.ndarray, "B H W"]
    counts: Int64[np.ndarray, "B 3 K"]
    """Pixel counts of the images, as returned by `iwm_fast.evals.segmentation.mean_iou.count_pixels`."""
    mean_iou: float
    """Mean IoU on all validation images."""


def save_figure(
    path: Path, images: FigureImages, segmented: dict[str, SegmentedImages], ignore_index: int, title: str
) -> None:
    """Draw a column for each image: the image, its map, and the classes and pixel accuracy of each variant.

    A legend explains the colours of all classes that the figure shows.
    """
    rows = [
        tuple(Panel(pixels=pixels) for pixels in images.pixels),
        tuple(Panel(pixels=pixels) for pixels in colourise(images.mask, ignore_index)),
    ]
    labels = ["image", "map"]
    for name, variant in segmented.items():
        labels.append(f"{name.replace('_', ' ')}, mean IoU {variant.mean_iou:.2f}")
        pairs = zip(colourise(variant.classes), variant.counts, strict=True)
        rows.append(tuple(Panel(pixels=pixels, caption=_accuracy_caption(counts)) for pixels, counts in pairs))
    legend = make_legend(images.mask, [variant.classes for variant in segmented.values()], ignore_index)
    save_image_grids(path, [ImageGrid(labels=tuple(labels), rows=tuple(rows), legend=legend)], title)


def make_legend(
    mask: UInt8[np.ndarray, "B H W"], predicted: list[np.ndarray], ignore_index: int
) -> dict[str, tuple[int, ...]]:
    """Return the colour of each class that the maps or the predictions contain, and of ignored pixels if there are any.

    Classes are named by their numbers, because segmentation maps hold no names.
    """
    is_ignored = mask == ignore_index
    numbers = np.unique(np.concatenate([mask[~is_ignored], *(classes.ravel() for classes in predicted)]))
    colours = colourise(numbers.astype(np.uint8)[None, None])[0, 0].tolist()
    legend = {f"class {number}": tuple(colour) for number, colour in zip(numbers, colours, strict=True)}
    return legend | ({"ignored": (0, 0, 0)} if is_ignored.any() else {})


def _accuracy_caption(counts: Int64[np.ndarray, "3 K"]) -> str:
    # The mean IoU of a single image is misleading, because missing a class of one pixel can halve it.
    return f"{pixel_accuracy(counts[None]):.0%} of pixels correct" if counts[2].any() else "all pixels ignored"


def colourise(classes: Integer[np.ndarray, "B H W"], ignore_index: int | None = None) -> UInt8[np.ndarray, "B H W 3"]:
    """Return class maps in colour. A class has the same colour in all figures; ignored pixels are black."""
    turns = (np.arange(256) * _TURN) % 1.0
    # Three levels of brightness also distinguish classes whose turns are similar.
    colours = [colorsys.hsv_to_rgb(turn, 0.65, 0.95 - 0.2 * (number % 3)) for number, turn in enumerate(turns)]
    table = np.round(np.array(colours) * 255).astype(np.uint8)
    if ignore_index is not None:
        table[ignore_index] = 0
    return table[classes]
