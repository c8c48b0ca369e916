"""Which patches of the source view are visible, and which are predicted.

Targets are the union of some rectangles, the context is the rest. Every position of the grid can be covered, area and
aspect of a rectangle are drawn independently, and lists keep their own length per image: nothing is cut to the
shortest of the batch (cutting in raster order starves the bottom rows of an image).
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64

from iwm_fast.pipelines.batch import RaggedIndex
from iwm_fast.pipelines.config import MaskConfig
from iwm_fast.pipelines.counter_rng import uniforms

# blocks may cover (almost) everything with unusual settings; the defaults never need a second draw
_MAX_DRAWS = 50


@dataclass(frozen=True, kw_only=True)
class Masks:
    """Two disjoint sets of patches for each of B images with N patches."""

    context: Bool[np.ndarray, "B N"]
    target: Bool[np.ndarray, "B N"]


def draw_masks(config: MaskConfig, grid: int, seed: int, step: int, slots: np.ndarray) -> Masks:
    """Draw the masks of the given slots of a step, on a square grid of patches.

    Raises:
        ValueError: if the settings (almost) never leave a patch for the context.
    """
    target = np.zeros((len(slots), grid * grid), bool)
    context = np.zeros_like(target)
    pending = np.arange(len(slots))
    for attempt in range(_MAX_DRAWS):
        uniform = uniforms(seed, f"mask {attempt}", step, slots[pending], 4 * config.num_target_blocks + 4)
        drawn = _from_uniforms(config, grid, uniform)
        target[pending], context[pending] = drawn.target, drawn.context
        pending = pending[~drawn.context.any(axis=1)]
        if len(pending) == 0:
            return Masks(context=context, target=target)
    raise ValueError(
        f"mask.num_target_blocks = {config.num_target_blocks} blocks of mask.block_scale = {config.block_scale} leave "
        f"no context patch on a {grid} x {grid} grid; take fewer or smaller blocks, or a wider mask.context_scale"
    )


def _from_uniforms(config: MaskConfig, grid: int, uniform: Float64[np.ndarray, "B uniforms"]) -> Masks:
    count = config.num_target_blocks
    blocks = uniform[:, : 4 * count].reshape(len(uniform), count, 4)
    target = np.any(_blocks(blocks, grid, config.block_scale, config.block_aspect), axis=1)
    context = np.logical_not(target)
    if config.context_scale is not None:
        context &= _blocks(uniform[:, None, 4 * count :], grid, config.context_scale, (1.0, 1.0))[:, 0]
    return Masks(context=context, target=target)


def _blocks(
    uniform: Float64[np.ndarray, "B K 4"], grid: int, scale: tuple[float, float], aspect: tuple[float, float]
) -> Bool[np.ndarray, "B K N"]:
    area = (scale[0] + (scale[1] - scale[0]) * uniform[..., 0]) * grid * grid
    ratio = aspect[0] + (aspect[1] - aspect[0]) * uniform[..., 1]
    height = np.clip(np.rint(np.sqrt(area * ratio)), 1, grid)
    width = np.clip(np.rint(np.sqrt(area / ratio)), 1, grid)
    # a place in [0, grid - side], both ends included: I-JEPA's sampler never reaches the last row and column
    top = np.floor(uniform[..., 2] * (grid - height + 1))
    left = np.floor(uniform[..., 3] * (grid - width + 1))
    line = np.arange(grid)
    rows = (line >= top[..., None]) & (line < (top + height)[..., None])
    columns = (line >= left[..., None]) & (line < (left + width)[..., None])
    return (rows[..., :, None] & columns[..., None, :]).reshape(*uniform.shape[:2], grid * grid)


def ragged_index(mask: Bool[np.ndarray, "B N"], total: int) -> RaggedIndex:
    """Pack a mask's patches image by image; `total` counts them over the whole global batch."""
    image, patch = np.nonzero(mask)
    lengths = mask.sum(axis=1)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int32)
    rows: Int64[np.ndarray, "M"] = image * mask.shape[1] + patch
    return RaggedIndex(
        patch=torch.from_numpy(patch),
        row=torch.from_numpy(rows),
        offsets=torch.from_numpy(offsets),
        longest=int(lengths.max(initial=0)),
        total=total,
    )


def all_patches(num_images: int, num_patches: int) -> RaggedIndex:
    """Index every patch of every image, as evaluation does."""
    return ragged_index(np.ones((num_images, num_patches), bool), num_images * num_patches)
