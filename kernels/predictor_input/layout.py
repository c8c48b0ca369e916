"""Which row is which: patches of a batch's images, and their places in packed sequences."""

from typing import NamedTuple

import torch
from torch import Tensor


class PatchIndex(NamedTuple):
    """Which patches the rows of context and targets stand for, packed one image after the other: image * N + patch.

    The patches of one image's targets must differ.
    """

    context: Tensor
    """(C,) int64."""
    targets: Tensor
    """(T,) int64."""


class PackedLayout(NamedTuple):
    """Where every row goes in the packed sequences."""

    context: Tensor
    """(C,) int64."""
    targets: Tensor
    """(T,) int64."""
    action_tokens: Tensor
    """(B * k,) int64."""
    offsets: Tensor
    """(B + 1,) int32: where each image's sequence begins."""


def packed_layout(
    context_offsets: Tensor, target_offsets: Tensor, num_action_tokens: int, *, num_context: int, num_targets: int
) -> PackedLayout:
    """Compute the destination of every row; integers only, on the offsets' device and without waiting for it.

    Args:
        context_offsets: (B + 1,) int32, where each image's context begins.
        target_offsets: (B + 1,) int32, likewise; an image's context or targets may be empty.
        num_action_tokens: tokens per image, k; 0 for none.
        num_context: rows of context over all images (the last offset, but known on the host).
        num_targets: rows of targets over all images.

    Raises:
        ValueError: if the two offsets belong to different numbers of images.
    """
    if context_offsets.shape != target_offsets.shape:
        shapes = tuple(context_offsets.shape), tuple(target_offsets.shape)
        raise ValueError(f"context_offsets and target_offsets must both have B + 1 entries, got shapes {shapes}")
    image = torch.arange(context_offsets.numel(), device=context_offsets.device)
    offsets = (context_offsets + target_offsets + num_action_tokens * image).int()
    # a row moves by what stands before it and is of another kind
    before_context = (target_offsets + num_action_tokens * image)[:-1]
    before_targets = context_offsets[1:] + num_action_tokens * image[:-1]
    token = torch.arange(num_action_tokens, device=image.device)
    action_tokens = (offsets[1:] - num_action_tokens)[:, None] + token
    return PackedLayout(
        context=_moved(context_offsets, before_context, num_context),
        targets=_moved(target_offsets, before_targets, num_targets),
        action_tokens=action_tokens.flatten(),
        offsets=offsets,
    )


def _moved(offsets: Tensor, shift: Tensor, num_rows: int) -> Tensor:
    row = torch.arange(num_rows, device=offsets.device)
    return row + torch.repeat_interleave(shift, offsets.diff(), output_size=num_rows)
