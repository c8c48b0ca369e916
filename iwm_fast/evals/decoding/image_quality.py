"""PSNR and SSIM of images with colours from 0 to 1."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

# Standard deviation and radius of the window in pixels, and the constants that stabilise small means and variances.
# Source: Wang et al. 2004, as `skimage.metrics.structural_similarity` computes it with gaussian_weights=True,
# sigma=1.5, use_sample_covariance=False and data_range=1.
_SIGMA, _RADIUS = 1.5, 5
_C1, _C2 = 0.01**2, 0.03**2

_MAX_PSNR_DB = 100.0


def psnr(image: Float[Tensor, "B 3 H W"], truth: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B"]:
    """Return the peak signal-to-noise ratio of each image in dB, at most 100, which equal images have."""
    mean_square = (image - truth).square().mean(dim=(1, 2, 3))
    return (-10 * mean_square.log10()).clamp(max=_MAX_PSNR_DB)


def ssim(image: Float[Tensor, "B 3 H W"], truth: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B"]:
    """Return the structural similarity of each image, the mean over channels and over windows inside the image.

    The window is smaller in images below 11 pixels.
    """
    radius = min(_RADIUS, (image.shape[-1] - 1) // 2)
    # Variances are small differences of large means, which needs float64 in flat regions.
    image, truth = image.double(), truth.double()
    moments = torch.stack([image, truth, image * image, truth * truth, image * truth])
    x, y, xx, yy, xy = _windowed_means(moments.flatten(0, 2)[:, None], radius).unflatten(0, moments.shape[:3])
    covariance, variances = xy - x * y, xx - x * x + yy - y * y
    luminance = (2 * x * y + _C1) / (x * x + y * y + _C1)
    structure = (2 * covariance + _C2) / (variances + _C2)
    return (luminance * structure).flatten(1).mean(dim=1).float()


def _windowed_means(maps: Float[Tensor, "M 1 H W"], radius: int) -> Float[Tensor, "M 1 h w"]:
    offset = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
    weight = torch.exp(-0.5 * (offset / _SIGMA) ** 2)
    weight /= weight.sum()
    rows = functional.conv2d(maps, weight.view(1, 1, -1, 1))
    return functional.conv2d(rows, weight.view(1, 1, 1, -1))
