"""Normalisation of pixels to the networks' input, and its inverse."""

import torch
from jaxtyping import Float, Float32, UInt8
from torch import Tensor

# The ImageNet statistics, as in I-JEPA and timm. Exported encoders expect images that are normalised with them.
PIXEL_MEAN = (0.485, 0.456, 0.406)
PIXEL_STD = (0.229, 0.224, 0.225)


def normalization() -> tuple[Float32[Tensor, "3 1 1"], Float32[Tensor, "3 1 1"]]:
    """Return scale and shift, with which the network's input is pixels * scale - shift."""
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (PIXEL_MEAN, PIXEL_STD))
    return (1 / (255 * std)).float(), (mean / std).float()


def normalize_view(view: UInt8[Tensor, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    """Convert pixels to the network's input: channels first, normalised by the ImageNet mean and standard deviation."""
    scale, shift = (values.to(view.device) for values in normalization())
    batch, height, width, _ = view.shape
    # One pass casts and permutes, two work in place. On a CPU this takes a fifth of the time of the plain expression,
    # which allocates an intermediate tensor for each operation.
    normalized = torch.empty((batch, 3, height, width), device=view.device)
    return normalized.copy_(view.permute(0, 3, 1, 2)).mul_(scale).sub_(shift)


def denormalize_view(view: Float[Tensor, "B 3 H W"]) -> UInt8[Tensor, "B H W 3"]:
    """Convert the network's input back to pixels, for figures."""
    mean, std = view.new_tensor(PIXEL_MEAN), view.new_tensor(PIXEL_STD)
    pixels = (view.permute(0, 2, 3, 1) * std + mean) * 255
    return pixels.round().clamp(0, 255).to(torch.uint8)
