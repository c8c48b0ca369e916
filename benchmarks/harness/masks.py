"""Lengths of sequences as training has them: visible patches, and visible plus predicted ones, of random masks."""

from typing import NamedTuple

import numpy as np

from iwm_fast.pipelines.batch import RaggedIndex
from iwm_fast.pipelines.config import MaskConfig
from iwm_fast.pipelines.sampling.masks import draw_masks, ragged_index

GRID = 14
"""Patches along a side of an image of 224 pixels."""


class MaskedBatch(NamedTuple):
    """Context and targets of a batch of images."""

    context: RaggedIndex
    target: RaggedIndex

    @property
    def joint_lengths(self) -> list[int]:
        """Length of each image's sequence in the predictor, without action tokens."""
        return [sum(pair) for pair in zip(self.context.lengths, self.target.lengths, strict=True)]


def masked_batch(
    slots: np.ndarray, global_batch_size: int, *, mask: MaskConfig | None = None, grid: int = GRID, step: int = 0
) -> MaskedBatch:
    """Draw the masks of these slots of a step's global batch, on the CPU, by default with the default settings."""
    masks = draw_masks(mask or MaskConfig(), grid, 0, step, np.arange(global_batch_size))
    return MaskedBatch(*(ragged_index(each[slots], int(each.sum())) for each in (masks.context, masks.target)))
