"""The reference implementation of the image operations, in torch on uint8 pixels; evaluations render with it, too."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from iwm_fast.pipelines.transforms.parameters import LUMA, Photometry, blur_radius, color_matrix, gray_gain


def resized_crop(image: UInt8[Tensor, "H W 3"], window: Float32[np.ndarray, "4"], size: int) -> UInt8[Tensor, "S S 3"]:
    """Cut the window (top, left, height, width) out of an image and resize it to a square, with antialiasing."""
    top, left, height, width = (int(value) for value in window)
    pixels = image[top : top + height, left : left + width].permute(2, 0, 1)[None].float()
    pixels = functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return _to_uint8(pixels[0].permute(1, 2, 0)).contiguous()


def render(crop: UInt8[Tensor, "B H W 3"], photometry: Photometry) -> UInt8[Tensor, "B H W 3"]:
    """Apply the parameters of a view: jitter and grayscale, then blur, then solarize."""
    pixels = recolor(crop, photometry)
    flagged = np.flatnonzero(photometry.blur)
    if len(flagged):
        pixels = pixels.clone()
        pixels[torch.from_numpy(flagged)] = blur(pixels[torch.from_numpy(flagged)], photometry.blur_sigma[flagged])
    return _where(photometry.solarize, torch.where(pixels >= 128, 255 - pixels, pixels), pixels)


def recolor(crop: UInt8[Tensor, "B H W 3"], photometry: Photometry) -> UInt8[Tensor, "B H W 3"]:
    """Apply the affine colour map defined in `iwm_fast.pipelines.transforms.parameters`, and clamp once at the end."""
    matrix = torch.from_numpy(color_matrix(photometry)).to(crop.device)
    gain = torch.from_numpy(gray_gain(photometry)).to(crop.device)
    pixels = crop.float()
    gray_mean = _luma(pixels.mean(dim=(1, 2)))
    # The product is written out, since the rounding of a batched matrix product may depend on the size of the batch.
    red, green, blue = (pixels[..., None, channel] for channel in range(3))
    columns = matrix[:, None, None].unbind(dim=-1)
    mapped = red * columns[0] + green * columns[1] + blue * columns[2]
    return _to_uint8(mapped + (gain * gray_mean)[:, None, None, None])


def blur(pixels: UInt8[Tensor, "B H W 3"], sigma: Float32[np.ndarray, "B"]) -> UInt8[Tensor, "B H W 3"]:
    """Blur each image with a Gaussian of its `sigma`, truncated at `blur_radius`, with reflection at the border."""
    return torch.stack([_blur_one(*pair) for pair in zip(pixels, sigma.tolist(), strict=True)])


def _blur_one(pixels: UInt8[Tensor, "H W 3"], sigma: float) -> UInt8[Tensor, "H W 3"]:
    radius = int(blur_radius(np.float32(sigma)))
    offset = torch.arange(-radius, radius + 1, device=pixels.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel = (kernel / kernel.sum())[None, None]
    planes = functional.pad(pixels.permute(2, 0, 1).float()[:, None], (radius,) * 4, mode="reflect")
    planes = functional.conv2d(functional.conv2d(planes, kernel[:, :, None]), kernel[..., None])
    return _to_uint8(planes[:, 0].permute(1, 2, 0)).contiguous()


def _luma(pixels: Float[Tensor, "*dims 3"]) -> Float[Tensor, "*dims"]:
    red, green, blue = pixels.unbind(dim=-1)
    return red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]


def _to_uint8(pixels: Shaped[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _where(
    flag: Bool[np.ndarray, "B"], if_true: UInt8[Tensor, "B H W 3"], if_false: UInt8[Tensor, "B H W 3"]
) -> Tensor:
    return torch.where(torch.from_numpy(flag).to(if_true.device)[:, None, None, None], if_true, if_false)
