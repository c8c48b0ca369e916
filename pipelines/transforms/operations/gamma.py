"""Gamma correction of both views: pixels in 0..1 are raised to a power."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.transforms.base import Entry, Levels, Parameters, ViewNumber


@dataclass(frozen=True, kw_only=True)
class Gamma(ViewNumber):
    """Gamma correction of each view, off by default."""

    probability: float = 0.0
    """Probability that a view's gamma is changed, drawn for each view. 0: gamma is not part of the action."""
    strength: float = 1.0
    """Strength s: pixels in 0..1 are raised to the power of 2^u, with u uniform in [-s, s]."""

    name: ClassVar[str] = "gamma"
    is_fast_on_cpu: ClassVar[bool] = True
    dali_inputs: ClassVar = {"exponent": ("FLOAT", 0)}
    dali_device_inputs: ClassVar = ("exponent",)

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "views.gamma.probability", self.probability, "be between 0 and 1")
        require(0 < self.strength <= 3, "views.gamma.strength", self.strength, "be above 0 and at most 3")

    @property
    def is_on(self) -> bool:
        """Whether it takes part."""
        return self.probability > 0

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The difference of the exponents' logarithms to base 2."""
        one_means = f"the target's gamma is {2**self.strength:.3g} times the source's"
        return (Entry(name="gamma", one_means=one_means, scale=self.strength, strength=self.strength),)

    def describe(self, change: dict[str, float]) -> list[str]:
        """Return the factor of gamma."""
        return [f"gamma × {2 ** change['gamma']:.2f}"] if abs(change.get("gamma", 0)) > 5e-3 else []

    def caption(self, name: str, value: float) -> str:
        """Return the exponent."""
        return f"gamma {2**value:.2f}"

    def apply(self, torch: Any, pixels: Any, parameters: Parameters) -> Any:
        """Raise pixels to the power."""
        exponent = torch.from_numpy(np.exp2(parameters["gamma"])).to(pixels.device)[:, None, None, None]
        return (255 * (pixels / 255) ** exponent).round().to(torch.uint8)

    def dali_values(self, parameters: Parameters, size: int) -> dict[str, np.ndarray]:
        """Return the exponents."""
        return {"exponent": np.exp2(parameters["gamma"])}

    def apply_dali(self, dali: Any, pixels: Any, inputs: dict[str, Any]) -> Any:
        """Raise pixels to the power."""
        return dali.fn.cast(255 * dali.math.pow(pixels / 255.0, inputs["exponent"]), dtype=dali.types.UINT8)

    def apply_planes(self, torch: Any, planes: Any, parameters: dict[str, float], levels: Levels) -> None:
        """Raise planes between black and white to the power."""
        span = levels.white - levels.black
        # Normalisation may round black to a value just below 0, of which there is no power.
        planes.sub_(levels.black).div_(span).clamp_(min=0).pow_(2 ** parameters["gamma"]).mul_(span).add_(levels.black)
