"""Grayscale: the colours of the source view are removed."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from jaxtyping import Bool, Float64

from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.transforms.base import LUMA, ColorMap, Entry, Parameters, PixelOperation


@dataclass(frozen=True, kw_only=True)
class Grayscale(PixelOperation):
    """Conversion of the source view to grey."""

    probability: float = 0.2
    """Probability that the source view is converted to grey."""

    name: ClassVar[str] = "grayscale"
    family: ClassVar = "inverse"
    num_uniforms: ClassVar[int] = 1
    first_column: ClassVar[int | None] = 5
    undone: ClassVar[str] = "Colours restored"

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "views.grayscale.probability", self.probability, "be between 0 and 1")

    @property
    def is_linear(self) -> bool:
        """Whether it is a colour map."""
        return True

    def draw(self, uniform: Float64[np.ndarray, "B n"], *, is_source: bool) -> Parameters:
        """Draw whether the colours are removed, from the source view only (paper section 3)."""
        return {"grayscale": (uniform[:, 0] < self.probability) & is_source}

    def neutral(self, num_images: int) -> Parameters:
        """Return no removal."""
        return {"grayscale": np.zeros(num_images, bool)}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The flag of the source."""
        one_means = "the source has lost its colours, the target has not"
        return (Entry(name="grayscale", undo="colour", one_means=one_means),)

    def destroy(self, num_images: int) -> Parameters:
        """Return the removal of all colours."""
        return {"grayscale": np.ones(num_images, bool)}

    def spread(self, name: str) -> tuple[float, float, float]:
        """Return the probability of the flag."""
        return self.probability, 0.0, 1.0

    def is_applied(self, parameters: Parameters) -> Bool[np.ndarray, "B"]:
        """Return the flag."""
        return parameters["grayscale"]

    def color_map(self, parameters: Parameters) -> ColorMap:
        """Return the projection on luma."""
        flag = parameters["grayscale"]
        gray = np.outer(np.ones(3), LUMA)
        return ColorMap(np.where(flag[:, None, None], gray, np.eye(3)), np.zeros(len(flag), np.float32))
