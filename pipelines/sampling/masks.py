"""Random masks: which patches of the source view are visible, and which patches are predicted.

The target is the union of random rectangles (blocks) of patches, and the context is the rest. There are three
differences from I-JEPA's sampler: a block can cover every position of the grid; its area and aspect are drawn
independently; and the number of patches varies by image, instead of being cut to the smallest number in the batch
(cutting lists in raster order removes patches from the bottom rows of an image).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from iwm_fast.pipelines.batch import RaggedIndex
from iwm_fast.pipelines.config import MaskConfig
from iwm_fast.pipelines.counter_rng import uniforms

# With unusual settings the blocks may cover the complete grid, which leaves no context; the mask is then drawn again.
# The default settings never need a second draw.
_MAX_DRAWS = 50


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Two disjoint sets of patches for each of B images with N patches."""

    context: Bool[np.ndarray, "B N"]
    target: Bool[np.ndarray, "B N"]


def draw_masks(config: MaskConfig, grid: int, seed: int, step: int, slots: np.ndarray) -> Masks:
    """Draw the masks of these slots of a step, on a square grid with `grid` patches along each side.

    Raises:
        ValueError: if a slot has no context patch after 50 draws.
    """
    target = np.zeros((len(slots), grid * grid), bool)
    context = np.zeros_like(target)
    pending = np.arange(len(slots))
    for attempt in range(_MAX_DRAWS):
        # Four numbers for each block, and four for the rectangle of the context. The attempt is part of the stream's
        # name, so a slot's mask does not depend on the slots that it is drawn with.
        uniform = uniforms(seed, f"mask {attempt}", step, slots[pending], 4 * config.num_target_blocks + 4)
        drawn = _masks_from_uniforms(config, grid, uniform)
        target[pending], context[pending] = drawn.target, drawn.context
        pending = pending[~drawn.context.any(axis=1)]
        if len(pending) == 0:
            return Masks(context=context, target=target)
    raise ValueError(
        f"mask.num_target_blocks = {config.num_target_blocks} blocks of mask.block_scale = {config.block_scale} leave "
        f"no context patch on a {grid} x {grid} grid; use fewer or smaller blocks, or a larger mask.context_scale"
    )


def _masks_from_uniforms(config: MaskConfig, grid: int, uniform: Float64[np.ndarray, "B uniforms"]) -> Masks:
    count = config.num_target_blocks
    block_uniform = uniform[:, : 4 * count].reshape(len(uniform), count, 4)
    target = np.any(_block_masks(block_uniform, grid, config.block_scale, config.block_aspect), axis=1)
    context = np.logical_not(target)
    if config.context_scale is not None:
        context &= _block_masks(uniform[:, None, 4 * count :], grid, config.context_scale, (1.0, 1.0))[:, 0]
    return Masks(context=context, target=target)


def _block_masks(
    uniform: Float64[np.ndarray, "B K 4"], grid: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> Bool[np.ndarray, "B K N"]:
    """Turn four uniform numbers (area, aspect, top, left) into the mask of a block, for K blocks of each image."""
    area = (scale[0] + (scale[1] - scale[0]) * uniform[..., 0]) * grid * grid
    ratio = aspect[0] + (aspect[1] - aspect[0]) * uniform[..., 1]
    height = np.clip(np.rint(np.sqrt(area * ratio)), 1, grid)
    width = np.clip(np.rint(np.sqrt(area / ratio)), 1, grid)
    # Uniform in 0 .. grid - side, both ends included. I-JEPA's sampler excludes the upper end, so that its blocks never
    # reach the last row and column.
    top = np.floor(uniform[..., 2] * (grid - height + 1))
    left = np.floor(uniform[..., 3] * (grid - width + 1))
    cells = np.arange(grid)
    rows = (cells >= top[..., None]) & (cells < (top + height)[..., None])
    columns = (cells >= left[..., None]) & (cells < (left + width)[..., None])
    return (rows[..., :, None] & columns[..., None, :]).reshape(*uniform.shape[:2], grid * grid)


def ragged_index(mask: Bool[np.ndarray, "B N"], total: int) -> RaggedIndex:
    """Pack the patches where a mask is true image after image; `total` is their number in the global batch."""
    image, patch = np.nonzero(mask)
    lengths = mask.sum(axis=1)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    rows: Int64[np.ndarray, "M"] = image * mask.shape[1] + patch
    return RaggedIndex(
        patch=torch.from_numpy(patch),
        row=torch.from_numpy(rows),
        offsets=torch.from_numpy(offsets),
        lengths=tuple(lengths.tolist()),
        total=total,
    )


def all_patches(num_images: int, num_patches: int) -> RaggedIndex:
    """Return the index of all patches of all images, as used in evaluation."""
    return ragged_index(np.ones((num_images, num_patches), bool), num_images * num_patches)
