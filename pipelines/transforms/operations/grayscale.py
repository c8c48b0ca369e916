"""Grayscale: the colours of the source view are removed, by the colour map that projects on luma."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.transforms.base import Parameters, SourceFlag
from iwm_fast.pipelines.transforms.color_map import GRAY, ColorMap


@dataclass(frozen=True, kw_only=True)
class Grayscale(SourceFlag):
    """Conversion of the source view to grey."""

    probability: float = 0.2
    """Probability that the source view is converted to grey."""

    name: ClassVar[str] = "grayscale"
    first_column: ClassVar[int | None] = 5
    undo: ClassVar[str] = "colour"
    undone: ClassVar[str] = "Colours restored"
    one_means: ClassVar[str] = "the source has lost its colours, the target has not"

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "views.grayscale.probability", self.probability, "be between 0 and 1")

    @property
    def is_linear(self) -> bool:
        """Whether it is a colour map."""
        return True

    def color_map(self, parameters: Parameters) -> ColorMap:
        """Return the projection on luma."""
        flag = parameters["grayscale"]
        return ColorMap(np.where(flag[:, None, None], GRAY, np.eye(3)), np.zeros(len(flag), np.float32))
