"""Patches of images as training has them: visible ones and those to predict, by random masks."""

import numpy as np

from iwm_fast.pipelines.batch import RaggedIndex
from iwm_fast.pipelines.config import MaskConfig
from iwm_fast.pipelines.sampling.masks import draw_masks, ragged_index

GRID = 14
"""Patches along a side of an image of 224 pixels."""


def masked_batch(
    count: int,
    slots: np.ndarray | slice = slice(None),
    *,
    mask: MaskConfig | None = None,
    grid: int = GRID,
    step: int = 0,
) -> tuple[RaggedIndex, RaggedIndex]:
    """Return context and target of these slots of a step's `count` images, on the CPU, by default of default masks."""
    masks = draw_masks(mask or MaskConfig(), grid, 0, step, np.arange(count))
    context, target = (ragged_index(each[slots], int(each.sum())) for each in (masks.context, masks.target))
    return context, target
