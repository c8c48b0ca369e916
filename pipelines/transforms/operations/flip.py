"""Horizontal flip of both views, and optionally of the source view against the target view."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.transforms.base import Entry, Parameters, Transformation


@dataclass(frozen=True, kw_only=True)
class Flip(Transformation):
    """Horizontal flips."""

    probability: float = 0.5
    """Probability of the shared horizontal flip."""
    source_probability: float = 0.0
    """Probability that the source view is mirrored relative to the target view, which is part of the action."""

    name: ClassVar[str] = "flip"

    def __post_init__(self) -> None:
        for name in ("probability", "source_probability"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"views.flip.{name}", value, "be between 0 and 1")

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Whether the source is mirrored against the target, if it may be (not in the paper)."""
        entry = Entry(name="flip", undo="mirror", one_means="the source is mirrored against the target")
        return (entry,) if self.source_probability > 0 else ()

    def change(self, source: Parameters, target: Parameters) -> Parameters:
        """Return the flag of the source, which is 0 if the source does not have it."""
        zero = np.zeros(len(next(iter(target.values()))), np.float32)
        return {entry.name: source.get(entry.name, zero) for entry in self.entries}
