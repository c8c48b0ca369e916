"""Colour jitter by torchvision's functions, for comparison with the colour map."""

import torch
from jaxtyping import UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional

from iwm_fast.pipelines.transforms.base import Parameters


def torchvision_jitter(pixels: UInt8[Tensor, "B H W 3"], parameters: Parameters) -> UInt8[Tensor, "B H W 3"]:
    """Change brightness, contrast, saturation and hue, one after the other."""
    images = []
    for number, image in enumerate(pixels.permute(0, 3, 1, 2)):
        changed = image
        for name in ("brightness", "contrast", "saturation"):
            changed = getattr(functional, f"adjust_{name}")(changed, float(parameters[name][number]))
        # torchvision takes at most half a turn in either direction.
        images.append(functional.adjust_hue(changed, (float(parameters["hue"][number]) + 0.5) % 1 - 0.5))
    return torch.stack(images).permute(0, 2, 3, 1)
