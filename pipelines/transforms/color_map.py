"""Affine maps of colours, and the one that jitter uses.

Brightness b scales the pixels, contrast c scales them about the image's grey mean g, and saturation s and hue h scale
and rotate the chroma plane of the YIQ colour space:

    out = b * (c * T x + (1 - c) * g),   T = G + s * (cos(2 pi h) * (I - G) + sin(2 pi h) * R)

G is the projection on grey and R rotates the chroma by 90 degrees. T keeps the grey mean, so the four operations
commute except for the clamp at the end, and four numbers describe a view without an order. Hue therefore differs from
torchvision's HSV hue, which changes luma. Neutral parameters give T = I exactly, and leave uint8 pixels bit-equal.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in luma, from ITU-R BT.601."""
GRAY = np.outer(np.ones(3), LUMA)
"""The matrix that projects colours on grey."""
# The I and Q axes of NTSC's YIQ. Each row sums to zero, so grey has no chroma.
_CHROMA = np.array([[0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_FROM_CHROMA = np.linalg.inv(np.vstack([LUMA, _CHROMA]))[:, 1:]
# Positive angles turn red to yellow and green, the direction of hue in HSV.
_QUARTER_TURN = _FROM_CHROMA @ np.array([[0.0, 1.0], [-1.0, 0.0]]) @ _CHROMA


class ColorMap(NamedTuple):
    """An affine map of colours for each of B images: matrix times pixel, plus gain times the image's grey mean.

    It keeps grey grey: the rows of a matrix have equal sums.
    """

    matrix: Float64[np.ndarray, "B 3 3"] | Float32[np.ndarray, "B 3 3"]
    """Matrix by which a pixel, a column of red, green and blue, is multiplied."""
    gray_gain: Float32[np.ndarray, "B"]
    """Factor of the image's mean luma, which is added to all channels."""

    @property
    def is_applied(self) -> Bool[np.ndarray, "B"]:
        """Whether the map changes the colours of an image."""
        return (self.matrix != np.eye(3)).any(axis=(1, 2)) | (self.gray_gain != 0)


def jitter_map(
    brightness: Float32[np.ndarray, "B"],
    contrast: Float32[np.ndarray, "B"],
    saturation: Float32[np.ndarray, "B"],
    hue: Float32[np.ndarray, "B"],
) -> ColorMap:
    """Return b * c * T and b * (1 - c)."""
    b, c, s, h = (values.astype(np.float64)[:, None, None] for values in (brightness, contrast, saturation, hue))
    turned = np.cos(2 * np.pi * h) * (np.eye(3) - GRAY) + np.sin(2 * np.pi * h) * _QUARTER_TURN
    return ColorMap(b * c * (GRAY + s * turned), brightness * (1 - contrast))
