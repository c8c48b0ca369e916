"""Random resized crop of both views, and optionally a further crop of the source view, which the action describes."""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Float32, Float64

from iwm_fast.pipelines.config import require_range
from iwm_fast.pipelines.transforms.base import Entry, Parameters, Transformation

_ENTRIES = ("crop_x", "crop_y", "crop_width", "crop_height")


@dataclass(frozen=True, kw_only=True)
class Crop(Transformation):
    """The region of the image that the views show."""

    scale: tuple[float, float] = (0.3, 1.0)
    """Range of the share of the image's area that the shared crop covers."""
    aspect: tuple[float, float] = (0.75, 4 / 3)
    """Range of the shared crop's aspect ratio (width / height), whose logarithm is drawn uniformly."""
    source_scale: tuple[float, float] | None = None
    """If set, the source view is a further crop that covers this share of the shared crop and is part of the action."""

    name: ClassVar[str] = "crop"

    def __post_init__(self) -> None:
        require_range("views.crop.scale", self.scale, 1e-3, 1.0)
        require_range("views.crop.aspect", self.aspect, 0.1, 10.0)
        if self.source_scale is not None:
            require_range("views.crop.source_scale", self.source_scale, 1e-3, 1.0)

    def draw(self, uniform: Float64[np.ndarray, "B 4"]) -> Float32[np.ndarray, "B 4"]:
        """Draw the shared crop: width and height over the square root of the image's area, then the position."""
        return self._draw(uniform, self.scale)

    def draw_source(self, uniform: Float64[np.ndarray, "B 4"]) -> Float32[np.ndarray, "B 4"]:
        """Draw the further crop of the source: width and height as fractions of the shared crop's, then position."""
        if self.source_scale is None:
            return full_crop(len(uniform))
        crop = self._draw(uniform, self.source_scale)
        # A crop that does not fit into the shared crop is shrunk and keeps its aspect, like the shared crop in the
        # image.
        crop[:, :2] /= np.maximum(crop[:, :2].max(axis=1, keepdims=True), 1)
        return crop

    def _draw(self, uniform: Float64[np.ndarray, "B 4"], scale: tuple[float, float]) -> Float32[np.ndarray, "B 4"]:
        low, high = scale
        area = low + (high - low) * uniform[:, 0]
        # Uniform in the logarithm, as in torchvision's RandomResizedCrop, so that wide and tall crops are equally
        # likely.
        min_log_aspect, max_log_aspect = np.log(self.aspect)
        aspect = np.exp(min_log_aspect + (max_log_aspect - min_log_aspect) * uniform[:, 1])
        columns = (np.sqrt(area * aspect), np.sqrt(area / aspect), uniform[:, 2], uniform[:, 3])
        return np.stack(columns, axis=1).astype(np.float32)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Centre and size of the source in the target view, if the source is a further crop (not in the paper)."""
        if self.source_scale is None:
            return ()
        # The largest offset of the centre and the largest logarithm of a side occur for the smallest crop.
        min_side = self.source_scale[0] ** 0.5
        offset, size = (1 - min_side) / 2 or 1.0, -math.log(min_side) or 1.0
        texts = (
            (offset, f"the source's centre lies {offset:g} target widths to the right of the target's"),
            (offset, f"the source's centre lies {offset:g} target heights below the target's"),
            (size, f"log(source width / target width) is {size:g}"),
            (size, f"log(source height / target height) is {size:g}"),
        )
        return tuple(
            Entry(name=name, scale=scale, one_means=text) for name, (scale, text) in zip(_ENTRIES, texts, strict=True)
        )

    def change(self, source: Parameters, target: Parameters) -> Parameters:
        """Return the entries from the position of the source view, which is 0 if the source does not have it."""
        zero = np.zeros(len(next(iter(target.values()))), np.float32)
        return {entry.name: source.get(entry.name, zero) for entry in self.entries}

    def describe(self, change: dict[str, float]) -> list[str]:
        """Return the region of the source in the target view."""
        if all(abs(change.get(name, 0)) <= 5e-3 for name in _ENTRIES):
            return []
        x, y, width, height = (change.get(name, 0.0) for name in _ENTRIES)
        return [f"from a crop of {math.exp(width):.2f} x {math.exp(height):.2f} at {x:+.2f}, {y:+.2f}"]


def full_crop(num_images: int) -> Float32[np.ndarray, "B 4"]:
    """Return the largest centred square of an image, or all of a shared crop."""
    # A square with the image's area does not fit into an oblong image; `geometry.crop_window` shrinks it to fit.
    return np.tile(np.array([1, 1, 0.5, 0.5], np.float32), (num_images, 1))
