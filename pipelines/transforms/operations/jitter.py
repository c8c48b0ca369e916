"""Colour jitter: brightness, contrast, saturation and hue, as one affine colour map (`transforms.color_map`)."""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Bool, Float64

from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.transforms.base import Entry, Parameters, PixelOperation
from iwm_fast.pipelines.transforms.color_map import ColorMap, jitter_map

_NEUTRAL = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0}
# Floor of factors in logarithms: 13 of 255 grey levels of a white pixel.
_MIN_FACTOR = 0.05
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

    encoding: Literal["difference", "log_ratio"] = "log_ratio"
    """How the action encodes brightness, contrast and saturation. log_ratio: log(target / source), which describes the
    change whatever the factors of the source are, and adds up over several actions; factors below 0.05 count as 0.05.
    difference: target minus source, as in the paper. Hue is a difference in both."""
    source: Literal["independent", "on_target"] = "independent"
    """How the source view is jittered. independent: both views jitter the shared crop; on_target: the source is
    jittered on top of the target's jitter. The action describes what each view has in all."""
    model: Literal["linear", "torchvision"] = "linear"
    """torchvision: its four functions one after the other, for comparison; needs runtime.loader=torch."""

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
        return self.model == "linear"

    @property
    def needs_plain_loader(self) -> bool:
        return self.model == "torchvision"

    def draw(self, uniform: Float64[np.ndarray, "B n"], *, is_source: bool) -> Parameters:
        is_jittered = uniform[:, 0] < self.probability
        parameters = {}
        for column, (name, neutral) in enumerate(_NEUTRAL.items(), start=1):
            drawn = neutral + getattr(self, name) * (2 * uniform[:, column] - 1)
            parameters[name] = np.where(is_jittered, drawn, neutral).astype(np.float32)
        return parameters

    def compose(self, source: Parameters, target: Parameters) -> Parameters:
        names = () if self.source == "independent" else _NEUTRAL
        return {name: (np.add if name == "hue" else np.multiply)(source[name], target[name]) for name in names}

    def neutral(self, num_images: int) -> Parameters:
        return {name: np.full(num_images, value, np.float32) for name, value in _NEUTRAL.items()}

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entry(name) for name in _NEUTRAL)

    def _entry(self, name: str) -> Entry:
        strength: float = getattr(self, name)
        if self._is_log(name):
            # Half the range of the logarithm. With a strength of 0 the change is always 0, and any divisor will do.
            scale = math.log((1 + strength) / max(1 - strength, _MIN_FACTOR)) / 2 or 1.0
            one_means = f"the target's {name} factor is {math.exp(scale):.3g} times the source's"
        else:
            scale, one_means = strength or 1.0, f"the target's {name} factor is {strength or 1.0:g} above the source's"
        if name == "hue":
            one_means = f"the target's hue is turned by {scale:g} of a full circle against the source's"
        return Entry(
            name=name, one_means=one_means, scale=scale, neutral=_NEUTRAL[name], strength=strength,
            needs_color=name in ("saturation", "hue"),
        )  # fmt: skip

    def _is_log(self, name: str) -> bool:
        return self.encoding == "log_ratio" and name != "hue"

    def change(self, source: Parameters, target: Parameters) -> Parameters:
        return {name: self._encoded(name, target[name]) - self._encoded(name, source[name]) for name in _NEUTRAL}

    def _encoded(self, name: str, value: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(value, np.float32(_MIN_FACTOR))) if self._is_log(name) else value

    def target(self, source: Parameters, change: Parameters) -> Parameters:
        return {
            name: source[name] * np.exp(change[name]) if self._is_log(name) else source[name] + change[name]
            for name in _NEUTRAL.keys() & change.keys()
        }

    def spread(self, name: str) -> tuple[float, float, float]:
        entry = self._entry(name)
        # Both ends of the range, then Gauss's nodes for its mean. With the rest of the probability, it is neutral.
        nodes, weight = np.polynomial.legendre.leggauss(32)
        drawn = dict.fromkeys(_NEUTRAL, entry.neutral + entry.strength * np.array([-1, 1, *nodes, 0]))
        weight = np.array([0, 0, *(self.probability * weight / 2), 1 - self.probability])
        target = {key: values[:, None] for key, values in drawn.items()}
        change = self.change(drawn | self.compose(drawn, target), target)[name] / entry.scale
        mean = round(float(weight @ change @ weight), 12)
        return mean, float(weight @ (change - mean) ** 2 @ weight) ** 0.5, float(np.abs(change).max())

    def describe(self, change: dict[str, float]) -> list[str]:
        phrases = []
        for name, value in ((name, change[name]) for name in _NEUTRAL if abs(change.get(name, 0)) > 5e-3):
            number = f"× {math.exp(value):.2f}" if self._is_log(name) else f"{value:+.2f}"
            phrases.append(f"{name} {value * 360:+.0f}°" if name == "hue" else f"{name} {number}")
        return phrases

    def caption(self, name: str, value: float) -> str:
        return f"{value * 360:+.0f}°" if name == "hue" else f"× {value:.2f}"

    def for_bank(self, strengths: str) -> "Jitter":
        defaults = {name: getattr(Jitter(), name) for name in _NEUTRAL}
        return replace(self, probability=1.0, **{"run": {}, "default": defaults, "strong": _STRONG}[strengths])

    def is_applied(self, parameters: Parameters) -> Bool[np.ndarray, "B"]:
        return np.any([parameters[name] != value for name, value in _NEUTRAL.items()], axis=0)

    def color_map(self, parameters: Parameters) -> ColorMap:
        return jitter_map(*(parameters[name] for name in _NEUTRAL))

    def apply(self, torch: Any, pixels: Any, parameters: Parameters) -> Any:
        from iwm_fast.pipelines.transforms.torchvision_jitter import torchvision_jitter

        return torchvision_jitter(pixels, parameters)
