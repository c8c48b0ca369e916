"""Solarize: values of 128 and above are inverted in the source view."""

from dataclasses import dataclass
from typing import Any, ClassVar

from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.transforms.base import Levels, Parameters, SourceFlag


@dataclass(frozen=True, kw_only=True)
class Solarize(SourceFlag):
    """Inversion of bright values of the source view."""

    probability: float = 0.2
    """Probability that the source view is solarised: values of 128 and more are inverted."""

    name: ClassVar[str] = "solarize"
    first_column: ClassVar[int | None] = 8
    is_fast_on_cpu: ClassVar[bool] = True
    undo: ClassVar[str] = "undo solarize"
    undone: ClassVar[str] = "Solarize undone"
    one_means: ClassVar[str] = "the source is solarized, the target is not"

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "views.solarize.probability", self.probability, "be between 0 and 1")

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
