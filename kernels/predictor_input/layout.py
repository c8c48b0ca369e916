"""Index tensors of the predictor's input: the patch that each row stands for, and its row in the packed sequences."""

from typing import NamedTuple

import torch
from torch import Tensor


class PatchIndex(NamedTuple):
    """The patch of each context and target row, as image * N + patch, one image after the other.

    The target patches of an image must differ from each other.
    """

    context: Tensor
    """(C,) int64."""
    targets: Tensor
    """(T,) int64."""


class PackedLayout(NamedTuple):
    """The row of each token in the packed sequences; that of an image is [context | targets | action tokens]."""

    context: Tensor
    """(C,) int64."""
    targets: Tensor
    """(T,) int64."""
    action_tokens: Tensor
    """(B * k,) int64."""
    offsets: Tensor
    """(B + 1,) int32, the first row of each image's sequence."""


def packed_layout(
    context_offsets: Tensor, target_offsets: Tensor, num_action_tokens: int, *, num_context: int, num_targets: int
) -> PackedLayout:
    """Compute the packed row of each token, on the device of the offsets and without waiting for it.

    Args:
        context_offsets: (B + 1,) int32, first context row of each image.
        target_offsets: (B + 1,) int32, first target row of each image. An image may have no context or no targets.
        num_action_tokens: action tokens per image, k; may be 0.
        num_context: context rows of all images; equals the last context offset, which only the device knows.
        num_targets: target rows of all images; equals the last target offset.

    Raises:
        ValueError: if the two offsets are for different numbers of images.
    """
    if context_offsets.shape != target_offsets.shape:
        shapes = tuple(context_offsets.shape), tuple(target_offsets.shape)
        raise ValueError(f"context_offsets and target_offsets must both have B + 1 entries, got shapes {shapes}")
    image = torch.arange(context_offsets.numel(), device=context_offsets.device)
    offsets = (context_offsets + target_offsets + num_action_tokens * image).int()
    # A row is shifted by the number of rows of the other two kinds that precede it.
    context_shift = (target_offsets + num_action_tokens * image)[:-1]
    target_shift = context_offsets[1:] + num_action_tokens * image[:-1]
    token = torch.arange(num_action_tokens, device=image.device)
    action_tokens = (offsets[1:] - num_action_tokens)[:, None] + token
    return PackedLayout(
        context=_shifted_rows(context_offsets, context_shift, num_context),
        targets=_shifted_rows(target_offsets, target_shift, num_targets),
        action_tokens=action_tokens.flatten(),
        offsets=offsets,
    )


def _shifted_rows(offsets: Tensor, shift: Tensor, num_rows: int) -> Tensor:
    """Return 0 .. num_rows - 1, each plus its image's entry of `shift` (B,)."""
    row = torch.arange(num_rows, device=offsets.device)
    # output_size saves repeat_interleave from reading the sum of the counts, which would wait for the device.
    return row + torch.repeat_interleave(shift, offsets.diff(), output_size=num_rows)
