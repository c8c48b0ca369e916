"""Posterize: only the upper bits of the source view's values are kept."""

from dataclasses import dataclass
from typing import Any, ClassVar

from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.transforms.base import Parameters, SourceFlag


@dataclass(frozen=True, kw_only=True)
class Posterize(SourceFlag):
    """Reduction of the source view to few levels, off by default."""

    probability: float = 0.0
    """Probability that the source view is posterised. 0: posterize is not part of the action."""
    bits: int = 3
    """Number of upper bits that each channel keeps, from 1 to 7."""

    name: ClassVar[str] = "posterize"
    undo: ClassVar[str] = "undo posterize"
    undone: ClassVar[str] = "Posterize undone"
    one_means: ClassVar[str] = "the source is posterised, the target is not"

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "views.posterize.probability", self.probability, "be between 0 and 1")
        require(1 <= self.bits <= 7, "views.posterize.bits", self.bits, "be between 1 and 7")

    @property
    def is_on(self) -> bool:
        """Whether it takes part."""
        return self.probability > 0

    @property
    def _mask(self) -> int:
        return 256 - 2 ** (8 - self.bits)

    def apply(self, torch: Any, pixels: Any, parameters: Parameters) -> Any:
        """Clear the lower bits."""
        return pixels & self._mask

    def apply_dali(self, dali: Any, pixels: Any, inputs: dict[str, Any]) -> Any:
        """Clear the lower bits."""
        return dali.fn.cast(pixels & self._mask, dtype=dali.types.UINT8)
