"""Plain torch image operations on uint8 pixels: the twin of the DALI graph, and what evaluations render with."""

import io

import numpy as np
import torch
from jaxtyping import Bool, Float32, Shaped, UInt8
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional

from pipelines.actions import LUMA, Photometry, color_matrix, gray_gain


# what Pillow raises for bytes that are no (complete) image
UNDECODABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def decode_image(encoded: UInt8[np.ndarray, "bytes"]) -> UInt8[Tensor, "H W 3"]:
    """Decode one image to RGB, turned upright as its EXIF tag says.

    Raises:
        one of UNDECODABLE: if the bytes are no complete image.
    """
    with Image.open(io.BytesIO(encoded.tobytes())) as image:
        return torch.from_numpy(np.array(ImageOps.exif_transpose(image).convert("RGB")))


def resized_crop(image: UInt8[Tensor, "H W 3"], window: Float32[np.ndarray, "4"], size: int) -> UInt8[Tensor, "S S 3"]:
    """Cut (top, left, height, width) out of an image and resize it to a square, antialiased."""
    top, left, height, width = (int(value) for value in window)
    pixels = image[top : top + height, left : left + width].permute(2, 0, 1)[None].float()
    pixels = functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return _to_uint8(pixels[0].permute(1, 2, 0)).contiguous()


def render(crop: UInt8[Tensor, "B H W 3"], photometry: Photometry) -> UInt8[Tensor, "B H W 3"]:
    """Apply one view's parameters: jitter, then gray, blur and solarize where they are flagged."""
    pixels = jitter(crop, photometry)
    pixels = _where(photometry.grayscale, grayscale(pixels), pixels)
    flagged = np.flatnonzero(photometry.blur)
    if len(flagged):
        pixels = pixels.clone()
        pixels[torch.from_numpy(flagged)] = blur(pixels[torch.from_numpy(flagged)], photometry.blur_sigma[flagged])
    return _where(photometry.solarize, torch.where(pixels >= 128, 255 - pixels, pixels), pixels)


def jitter(crop: UInt8[Tensor, "B H W 3"], photometry: Photometry) -> UInt8[Tensor, "B H W 3"]:
    """Apply the affine colour map of `pipelines.actions` with one clamp."""
    matrix = torch.from_numpy(color_matrix(photometry)).to(crop.device)
    gain = torch.from_numpy(gray_gain(photometry)).to(crop.device)
    pixels = crop.float()
    gray_mean = pixels.mean(dim=(1, 2)) @ pixels.new_tensor(LUMA)
    flat = pixels.flatten(1, 2)
    return _to_uint8((flat @ matrix.transpose(1, 2)).view_as(pixels) + (gain * gray_mean)[:, None, None, None])


def grayscale(pixels: UInt8[Tensor, "B H W 3"]) -> UInt8[Tensor, "B H W 3"]:
    """Replace each pixel by its luma, in three channels."""
    luma = pixels.float() @ torch.tensor(LUMA, dtype=torch.float32, device=pixels.device)
    return _to_uint8(luma)[..., None].expand_as(pixels).contiguous()


def blur(pixels: UInt8[Tensor, "B H W 3"], sigma: Float32[np.ndarray, "B"]) -> UInt8[Tensor, "B H W 3"]:
    """Blur each image with its own Gaussian, cut at 3 sigma as DALI does, reflected at the border."""
    radius = torch.from_numpy(np.ceil(3 * sigma)).to(pixels.device)
    widest = int(radius.max())
    place = torch.arange(-widest, widest + 1, device=pixels.device, dtype=torch.float32)
    scale = torch.from_numpy(sigma).to(pixels.device)[:, None]
    kernel = torch.exp(-0.5 * (place / scale) ** 2) * (place.abs() <= radius[:, None])
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(3, dim=0)
    planes = pixels.permute(0, 3, 1, 2).flatten(0, 1).float()[None]
    padded = functional.pad(planes, (widest,) * 4, mode="reflect")
    blurred = functional.conv2d(padded, kernel[:, None, None, :], groups=len(kernel))
    blurred = functional.conv2d(blurred, kernel[:, None, :, None], groups=len(kernel))
    return _to_uint8(blurred[0].unflatten(0, (-1, 3)).permute(0, 2, 3, 1)).contiguous()


def _to_uint8(pixels: Shaped[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    return pixels.round().clamp(0, 255).to(torch.uint8)


def _where(flag: Bool[np.ndarray, "B"], yes: UInt8[Tensor, "B H W 3"], no: UInt8[Tensor, "B H W 3"]) -> Tensor:
    return torch.where(torch.from_numpy(flag).to(yes.device)[:, None, None, None], yes, no)
