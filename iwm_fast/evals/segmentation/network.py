"""Classes of pixels from tokens of patches: a linear classifier of each patch, its scores spread over the pixels."""

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional

# images whose pixels' scores are in memory at once without a gradient: of 150 classes at 512 x 512, 160 MB each
_IMAGES = 4


def pixel_scores(scores: Float[Tensor, "B N K"], size: int) -> Float[Tensor, "B K H W"]:
    """Spread the scores of a square grid of patches over size x size pixels, bilinearly between patches' centres."""
    grid = round(scores.shape[1] ** 0.5)
    maps = scores.float().transpose(1, 2).unflatten(2, (grid, grid))
    return functional.interpolate(maps, size=(size, size), mode="bilinear", align_corners=False)


def pixel_loss(scores: Float[Tensor, "B N K"], mask: UInt8[Tensor, "B H W"], ignore_index: int) -> Float[Tensor, ""]:
    """Return the cross-entropy, the mean over each image's pixels that count, summed over images.

    An image without such pixels has no share in it.
    """
    spread = pixel_scores(scores, mask.shape[-1])
    loss = functional.cross_entropy(spread, mask.long(), ignore_index=ignore_index, reduction="none")
    num_counted = (mask != ignore_index).sum((1, 2))
    return (loss.sum((1, 2)) / num_counted.clamp(min=1)).sum()


def pixel_classes(scores: Float[Tensor, "B N K"], size: int) -> Int64[Tensor, "B H W"]:
    """Return each pixel's class, the one of the highest score."""
    return torch.cat([pixel_scores(part, size).argmax(dim=1) for part in scores.split(_IMAGES)])
