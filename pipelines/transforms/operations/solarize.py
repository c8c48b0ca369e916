"""Solarize: values of 128 and above are inverted in the source view."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.transforms.base import Entry, Levels, Parameters, PixelOperation


@dataclass(frozen=True, kw_only=True)
class Solarize(PixelOperation):
    """Inversion of bright values of the source view."""

    probability: float = 0.2
    """Probability that the source view is solarised: values of 128 and more are inverted."""

    name: ClassVar[str] = "solarize"
    family: ClassVar = "inverse"
    num_uniforms: ClassVar[int] = 1
    first_column: ClassVar[int | None] = 8
    is_fast_on_cpu: ClassVar[bool] = True
    undone: ClassVar[str] = "Solarize undone"

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "views.solarize.probability", self.probability, "be between 0 and 1")

    def draw(self, uniform: Float64[np.ndarray, "B n"], *, is_source: bool) -> Parameters:
        """Draw whether the source is solarized (paper section 3)."""
        return {"solarize": (uniform[:, 0] < self.probability) & is_source}

    def neutral(self, num_images: int) -> Parameters:
        """Return no inversion."""
        return {"solarize": np.zeros(num_images, bool)}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The flag of the source."""
        one_means = "the source is solarized, the target is not"
        return (Entry(name="solarize", undo="undo solarize", one_means=one_means),)

    def destroy(self, num_images: int) -> Parameters:
        """Return the inversion in all images."""
        return {"solarize": np.ones(num_images, bool)}

    def spread(self, name: str) -> tuple[float, float, float]:
        """Return the probability of the flag."""
        return self.probability, 0.0, 1.0

    def is_applied(self, parameters: Parameters) -> Bool[np.ndarray, "B"]:
        """Return the flag."""
        return parameters["solarize"]

    def apply(self, torch: Any, pixels: Any, parameters: Parameters) -> Any:
        """Invert values of 128 and above."""
        return torch.where(pixels >= 128, 255 - pixels, pixels)

    def apply_dali(self, dali: Any, pixels: Any, inputs: dict[str, Any]) -> Any:
        """Invert values of 128 and above."""
        # DALI has no element-wise selection, so x becomes x + (x >= 128) * (255 - 2 x), in integers.
        change = (pixels >= 128) * (255 - 2 * dali.fn.cast(pixels, dtype=dali.types.INT32))
        return dali.fn.cast(pixels + change, dtype=dali.types.UINT8)

    def apply_planes(self, torch: Any, planes: Any, parameters: dict[str, float], levels: Levels) -> None:
        """Mirror values above the middle at it."""
        inverted = torch.sub(levels.black + levels.white, planes, out=levels.scratch)
        torch.minimum(planes, inverted, out=planes)
