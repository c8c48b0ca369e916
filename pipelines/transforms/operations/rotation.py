"""Rotation of both views about their centres, each by an angle of its own.

Both views show the centred square that no allowed angle leaves empty, enlarged to the size of the views.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Bool, Float32, Float64

from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.transforms.base import Entry, Levels, Parameters, ViewNumber


@dataclass(frozen=True, kw_only=True)
class Rotation(ViewNumber):
    """Rotation of each view, off by default."""

    probability: float = 0.0
    """Probability that a view is rotated, drawn separately for each view. 0: rotation is not part of the action."""
    strength: float = 20.0
    """Largest angle in degrees: angles are uniform in [-strength, strength]. Positive ones turn counterclockwise."""

    name: ClassVar[str] = "rotation"
    is_fast_on_cpu: ClassVar[bool] = True
    dali_inputs: ClassVar = {"matrix": ("FLOAT", 2)}

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "views.rotation.probability", self.probability, "be between 0 and 1")
        require(0 < self.strength <= 45, "views.rotation.strength", self.strength, "be above 0 and at most 45 degrees")

    @property
    def is_on(self) -> bool:
        """Whether it takes part."""
        return self.probability > 0

    @property
    def _side(self) -> float:
        """Side of the square that both views show, as a share of the view's side."""
        angle = math.radians(self.strength)
        return 1 / (math.cos(angle) + math.sin(angle))

    def draw(self, uniform: Float64[np.ndarray, "B n"], *, is_source: bool) -> Parameters:
        """Draw whether the view is rotated, and the angle; all views show the square."""
        return self._with_side(super().draw(uniform, is_source=is_source), self._side)

    def neutral(self, num_images: int) -> Parameters:
        """Return no rotation of the complete view."""
        return self._with_side(super().neutral(num_images), 1.0)

    def query_source(self, num_images: int) -> Parameters:
        """Return no rotation of the square."""
        return self._with_side(super().neutral(num_images), self._side)

    @staticmethod
    def _with_side(parameters: Parameters, side: float) -> Parameters:
        return parameters | {"rotation_side": np.full(len(parameters["rotation"]), side, np.float32)}

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The difference of the angles."""
        one_means = f"the target is turned by {self.strength:g} degrees counterclockwise against the source"
        return (Entry(name="rotation", one_means=one_means, scale=self.strength, strength=self.strength),)

    def describe(self, change: dict[str, float]) -> list[str]:
        """Return the angle."""
        return [f"turn {change['rotation']:+.0f}°"] if abs(change.get("rotation", 0)) >= 0.5 else []

    def caption(self, name: str, value: float) -> str:
        """Return the angle."""
        return f"{value:+.0f}°"

    def is_applied(self, parameters: Parameters) -> Bool[np.ndarray, "B"]:
        """Return whether the view is not the complete, upright one."""
        return (parameters["rotation"] != 0) | (parameters["rotation_side"] != 1)

    def apply(self, torch: Any, pixels: Any, parameters: Parameters) -> Any:
        """Sample the rotated square bilinearly."""
        matrix = _sampling_matrix(parameters["rotation"], parameters["rotation_side"])
        rotated = _sampled(torch, pixels.permute(0, 3, 1, 2).float(), matrix)
        return rotated.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def dali_values(self, parameters: Parameters, size: int) -> dict[str, np.ndarray]:
        """Return the matrices from a position in the output to the one in the input, in pixels."""
        matrix = _sampling_matrix(parameters["rotation"], parameters["rotation_side"])
        centre = np.full((2, 1), size / 2, np.float32)
        return {"matrix": np.concatenate((matrix, centre - matrix @ centre), axis=2)}

    def apply_dali(self, dali: Any, pixels: Any, inputs: dict[str, Any]) -> Any:
        """Sample the rotated square bilinearly."""
        # The matrix leads from the output to the input, which DALI calls an inverse map.
        return dali.fn.warp_affine(
            pixels, matrix=inputs["matrix"], inverse_map=True, interp_type=dali.types.INTERP_LINEAR
        )

    def apply_planes(self, torch: Any, planes: Any, parameters: dict[str, float], levels: Levels) -> None:
        """Sample the rotated square bilinearly."""
        matrix = _sampling_matrix(*(np.float32([parameters[name]]) for name in ("rotation", "rotation_side")))
        planes.copy_(_sampled(torch, planes[None], matrix)[0])


def _sampling_matrix(angle: Float32[np.ndarray, "B"], side: Float32[np.ndarray, "B"]) -> Float32[np.ndarray, "B 2 2"]:
    """Return the matrices from an offset from the centre in the output, right and down, to the one in the input."""
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    return (side * np.array([[cos, -sin], [sin, cos]])).transpose(2, 0, 1).astype(np.float32)


def _sampled(torch: Any, planes: Any, matrix: Float32[np.ndarray, "B 2 2"]) -> Any:
    """Sample (B, 3, S, S) planes at the positions to which the matrices lead."""
    functional = torch.nn.functional
    theta = functional.pad(torch.from_numpy(matrix).to(planes.device), (0, 1))
    grid = functional.affine_grid(theta, list(planes.shape), align_corners=False)
    return functional.grid_sample(planes, grid, mode="bilinear", padding_mode="border", align_corners=False)
