"""Gaussian blur of the source view, truncated at three standard deviations, with reflection at the border."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float32, Float64

from iwm_fast.pipelines.config import require, require_range
from iwm_fast.pipelines.transforms.base import Levels, Parameters, SourceFlag


@dataclass(frozen=True, kw_only=True)
class Blur(SourceFlag):
    """Gaussian blur of the source view."""

    probability: float = 0.2
    """Probability that the source view is blurred."""
    sigma: tuple[float, float] = (0.1, 2.0)
    """Range of the blur's standard deviation in pixels."""

    name: ClassVar[str] = "blur"
    num_uniforms: ClassVar[int] = 2
    first_column: ClassVar[int | None] = 6
    is_fast_on_cpu: ClassVar[bool] = True
    dali_inputs: ClassVar = {"sigma": ("FLOAT", 0), "window": ("INT32", 0)}
    undo: ClassVar[str] = "sharpen"
    undone: ClassVar[str] = "Blur undone"
    one_means: ClassVar[str] = "the source is blurred, the target is not"

    def __post_init__(self) -> None:
        require(0 <= self.probability <= 1, "views.blur.probability", self.probability, "be between 0 and 1")
        require_range("views.blur.sigma", self.sigma, 0.01, np.inf)

    def check(self, size: int) -> None:
        """Check that the largest kernel fits: reflection at the border needs 3 sigma pixels on each side."""
        require_range("views.blur.sigma", self.sigma, 0.01, (size - 2) / 3)

    def draw(self, uniform: Float64[np.ndarray, "B n"], *, is_source: bool) -> Parameters:
        """Draw whether the source is blurred, and the standard deviation."""
        low, high = self.sigma
        sigma = (low + (high - low) * uniform[:, 1]).astype(np.float32)
        return super().draw(uniform, is_source=is_source) | {"blur_sigma": sigma}

    def neutral(self, num_images: int) -> Parameters:
        """Return no blur; the standard deviation has no effect then."""
        return super().neutral(num_images) | {"blur_sigma": np.ones(num_images, np.float32)}

    def query_source(self, num_images: int) -> Parameters:
        """Return a blur with the middle of the range."""
        return super().query_source(num_images) | {"blur_sigma": np.full(num_images, sum(self.sigma) / 2, np.float32)}

    def apply(self, torch: Any, pixels: Any, parameters: Parameters) -> Any:
        """Blur each image by two convolutions."""
        blurred = [
            _blurred(torch, *pair).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0)
            for pair in zip(pixels.permute(0, 3, 1, 2), parameters["blur_sigma"].tolist(), strict=True)
        ]
        return torch.stack(blurred)

    def dali_values(self, parameters: Parameters, size: int) -> dict[str, np.ndarray]:
        """Return the standard deviation and the width of the kernel."""
        sigma = parameters["blur_sigma"]
        return {"sigma": sigma, "window": np.asarray(2 * blur_radius(sigma) + 1, np.int32)}

    def apply_dali(self, dali: Any, pixels: Any, inputs: dict[str, Any]) -> Any:
        """Blur by DALI's operator."""
        return dali.fn.gaussian_blur(pixels, sigma=inputs["sigma"], window_size=inputs["window"])

    def apply_planes(self, torch: Any, planes: Any, parameters: dict[str, float], levels: Levels) -> None:
        """Blur one axis after the other by sums of shifted planes.

        torch's convolutions of a single channel take four times as long.
        """
        size = planes.shape[-1]
        radius, kernel = _kernel(torch, parameters["blur_sigma"])
        first, *weights = kernel.tolist()
        padded = torch.nn.functional.pad(planes[None], (radius,) * 4, mode="reflect")[0]
        rows = first * padded[:, :size]
        for shift, weight in enumerate(weights, start=1):
            rows.add_(padded[:, shift : shift + size], alpha=weight)
        torch.mul(rows[..., :size], first, out=planes)
        for shift, weight in enumerate(weights, start=1):
            planes.add_(rows[..., shift : shift + size], alpha=weight)


def blur_radius(sigma: Float32[np.ndarray, "*B"] | np.float32) -> Float32[np.ndarray, "*B"] | np.float32:
    """Return the radius of a Gaussian kernel in pixels: three standard deviations, rounded up."""
    return np.ceil(3 * sigma)


def _kernel(torch: Any, sigma: float) -> tuple[int, Any]:
    """Return radius and weights of a Gaussian."""
    radius = int(blur_radius(np.float32(sigma)))
    offset = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    return radius, kernel / kernel.sum()


def _blurred(torch: Any, planes: Any, sigma: float) -> Any:
    """Return blurred float32 planes of (3, H, W) pixels."""
    radius, kernel = _kernel(torch, sigma)
    kernel = kernel.to(planes.device)[None, None]
    planes = torch.nn.functional.pad(planes.float()[:, None], (radius,) * 4, mode="reflect")
    conv2d = torch.nn.functional.conv2d
    return conv2d(conv2d(planes, kernel[:, :, None]), kernel[..., None])[:, 0]
