"""The reference implementation of the image operations, in torch on uint8 pixels; evaluations render with it, too."""

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped, UInt8
from torch import Tensor
from torch.nn import functional

from iwm_fast.pipelines.transforms.base import Parameters
from iwm_fast.pipelines.transforms.color_map import LUMA, ColorMap
from iwm_fast.pipelines.transforms.composition import ViewConfig, fused_color_map


def resized_crop(image: UInt8[Tensor, "H W 3"], window: Float32[np.ndarray, "4"], size: int) -> UInt8[Tensor, "S S 3"]:
    """Cut the window (top, left, height, width) out of an image and resize it to a square, with antialiasing."""
    top, left, height, width = (int(value) for value in window)
    pixels = image[top : top + height, left : left + width].permute(2, 0, 1)[None].float()
    pixels = functional.interpolate(pixels, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return _to_uint8(pixels[0].permute(1, 2, 0)).contiguous()


def render(crop: UInt8[Tensor, "B H W 3"], parameters: Parameters, views: ViewConfig) -> UInt8[Tensor, "B H W 3"]:
    """Apply the pixel operations of `views` with the parameters of a view."""
    pixels = crop
    for operation, *others in views.steps:
        if operation.is_linear:
            pixels = recolor(pixels, fused_color_map((operation, *others), parameters))
            continue
        changed = np.flatnonzero(operation.is_applied(parameters))
        if len(changed):
            index, selected = torch.from_numpy(changed), {name: values[changed] for name, values in parameters.items()}
            pixels = pixels.index_copy(0, index.to(pixels.device), operation.apply(torch, pixels[index], selected))
    return pixels


def recolor(pixels: UInt8[Tensor, "B H W 3"], color_map: ColorMap) -> UInt8[Tensor, "B H W 3"]:
    """Apply an affine colour map, and clamp once at the end."""
    if not color_map.is_applied.any():
        return pixels
    matrix, gain = (torch.from_numpy(values).to(pixels.device) for values in color_map)
    pixels = pixels.float()
    gray_mean = _luma(pixels.mean(dim=(1, 2)))
    # The product is written out, since the rounding of a batched matrix product may depend on the size of the batch.
    red, green, blue = (pixels[..., None, channel] for channel in range(3))
    columns = matrix[:, None, None].unbind(dim=-1)
    mapped = red * columns[0] + green * columns[1] + blue * columns[2]
    return _to_uint8(mapped + (gain * gray_mean)[:, None, None, None])


def _luma(pixels: Float[Tensor, "*dims 3"]) -> Float[Tensor, "*dims"]:
    red, green, blue = pixels.unbind(dim=-1)
    return red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]


def _to_uint8(pixels: Shaped[Tensor, "..."]) -> UInt8[Tensor, "..."]:
    return pixels.round().clamp(0, 255).to(torch.uint8)
