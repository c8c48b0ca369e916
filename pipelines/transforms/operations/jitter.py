"""Colour jitter: brightness, contrast, saturation and hue, as one affine colour map.

Brightness b scales the pixels, contrast c scales them about the image's grey mean g, and saturation s and hue h scale
and rotate the chroma plane of the YIQ colour space:

    out = b * (c * T x + (1 - c) * g),   T = G + s * (cos(2 pi h) * (I - G) + sin(2 pi h) * R)

G is the projection on grey and R rotates the chroma by 90 degrees. T keeps the grey mean, so the four operations
commute except for the clamp at the end, and four numbers describe a view without an order. Hue therefore differs from
torchvision's HSV hue, which changes luma. Neutral parameters give T = I exactly, and leave uint8 pixels bit-equal.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.transforms.base import LUMA, ColorMap, Entry, Parameters, PixelOperation

# The I and Q axes of NTSC's YIQ. Each row sums to zero, so grey has no chroma.
_CHROMA = np.array([[0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])
_GRAY = np.outer(np.ones(3), LUMA)
_FROM_CHROMA = np.linalg.inv(np.vstack([LUMA, _CHROMA]))[:, 1:]
# Positive angles turn red to yellow and green, the direction of hue in HSV.
_QUARTER_TURN = _FROM_CHROMA @ np.array([[0.0, 1.0], [-1.0, 0.0]]) @ _CHROMA

_NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
# Strong jitter. The strengths are ours, because those of the paper are not known.
_STRONG = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2}


@dataclass(frozen=True, kw_only=True)
class Jitter(PixelOperation):
    """Brightness, contrast, saturation and hue of each view."""

    probability: float = 0.8
    """Probability that a view's colours are jittered, drawn separately for each view."""
    brightness: float = 0.4
    """Strength s: the brightness factor is uniform in [max(0, 1 - s), 1 + s]."""
    contrast: float = 0.4
    """Strength s of the contrast factor, relative to the mean grey level of the image."""
    saturation: float = 0.2
    """Strength s of the saturation factor."""
    hue: float = 0.1
    """Strength h, at most 0.5: the hue turns (in YIQ) by a share of the full circle, uniform in [-h, h]."""

    name: ClassVar[str] = "jitter"
    family: ClassVar = "forward"
    num_uniforms: ClassVar[int] = 5
    first_column: ClassVar[int | None] = 0
    has_gray_gain: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "views.jitter.probability", self.probability, "be between 0 and 1")
        # A hue rotation by more than half a circle equals a smaller one in the opposite direction.
        for name, limit in (("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.5)):
            value = getattr(self, name)
            require(0 <= value <= limit, f"views.jitter.{name}", value, f"be between 0 and {limit:g}")

    @property
    def is_linear(self) -> bool:
        """Whether it is a colour map."""
        return True

    def draw(self, uniform: Float64[np.ndarray, "B n"], *, is_source: bool) -> Parameters:
        """Draw whether the image is jittered, then four parameters."""
        is_jittered = uniform[:, 0] < self.probability
        parameters = {}
        for column, (name, neutral) in enumerate(_NEUTRAL.items(), start=1):
            drawn = neutral + getattr(self, name) * (2 * uniform[:, column] - 1)
            parameters[name] = np.where(is_jittered, drawn, neutral).astype(np.float32)
        return parameters

    def neutral(self, num_images: int) -> Parameters:
        """Return factors of 1 and no rotation."""
        return {name: np.full(num_images, value, np.float32) for name, value in _NEUTRAL.items()}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The four differences, target minus source, divided by their strengths. Source: paper section 3."""
        return tuple(self._entry(name, neutral) for name, neutral in _NEUTRAL.items())

    def _entry(self, name: str, neutral: float) -> Entry:
        # With a strength of 0 the difference is always 0, and any divisor will do.
        scale = getattr(self, name) or 1.0
        one_means = f"the target's {name} factor is {scale:g} above the source's"
        if name == "hue":
            one_means = f"the target's hue is turned by {scale:g} of a full circle against the source's"
        return Entry(
            name=name, one_means=one_means, scale=scale, neutral=neutral, strength=getattr(self, name),
            needs_color=name in ("saturation", "hue"),
        )  # fmt: skip

    def describe(self, change: dict[str, float]) -> list[str]:
        """Return the changes that are not displayed as 0.00."""
        asked = {name: change[name] for name in _NEUTRAL if abs(change.get(name, 0)) > 5e-3}
        return [f"hue {x * 360:+.0f}°" if name == "hue" else f"{name} {x:+.2f}" for name, x in asked.items()]

    def caption(self, name: str, value: float) -> str:
        """Return degrees for hue and a factor for the others."""
        return f"{value * 360:+.0f}°" if name == "hue" else f"× {value:.2f}"

    def spread(self, name: str) -> tuple[float, float, float]:
        """Return the moments of a difference of two parameters."""
        # A parameter is uniform in [-1, 1] about neutral, in units of the strength, with probability p, and otherwise
        # neutral, so its variance is p / 3.
        return 0.0, (2 * self.probability / 3) ** 0.5, 2.0

    def for_bank(self, strengths: str, default: PixelOperation) -> "Jitter":
        """Return settings with a probability of 1, because several candidates could tie as the unchanged image."""
        configured = self if strengths == "run" else default
        values = _STRONG if strengths == "strong" else {name: getattr(configured, name) for name in _NEUTRAL}
        return replace(self, probability=1.0, **values)

    def is_applied(self, parameters: Parameters) -> Bool[np.ndarray, "B"]:
        """Return whether a parameter is not neutral."""
        return np.any([parameters[name] != value for name, value in _NEUTRAL.items()], axis=0)

    def color_map(self, parameters: Parameters) -> ColorMap:
        """Return b * c * T and b * (1 - c)."""
        b, c, saturation, hue = (parameters[name].astype(np.float64)[:, None, None] for name in _NEUTRAL)
        angle = 2 * np.pi * hue
        turned = np.cos(angle) * (np.eye(3) - _GRAY) + np.sin(angle) * _QUARTER_TURN
        gain = parameters["brightness"] * (1 - parameters["contrast"])
        return ColorMap(b * c * (_GRAY + saturation * turned), gain)
