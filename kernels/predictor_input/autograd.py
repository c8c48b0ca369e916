"""The predictor's input as two operations of torch.library: target rows copied from a table, or computed by the mixer.

Both are custom operations, whose inside torch.compile does not trace, so that a new number of rows needs no new graph.
torch.library accepts tensors but no named tuples: the argument `indices` is [*PatchIndex, *PackedLayout].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from iwm_fast.kernels.launch import architecture, upcast_for_interpreter
from iwm_fast.kernels.predictor_input.conditioning_mlp import FirstLayer, first_launch, second_launch, third_launch
from iwm_fast.kernels.predictor_input.gather_scatter import gather_launch, group_sum_launch, scatter_launch
from iwm_fast.kernels.predictor_input.layout import PackedLayout, PatchIndex


@torch.library.custom_op("iwm_fast::copied_input", mutates_args=())
def copied_input(
    context: Tensor, positions: Tensor, mask_tokens: Tensor, action_tokens: Tensor, indices: Sequence[Tensor]
) -> Tensor:
    """Pack context + positions[patch], mask_tokens[patch] and action tokens.

    Args:
        context: (C, P).
        positions: (N, P), constant.
        mask_tokens: (N, P), the mask token at each position, from which target rows are copied.
        action_tokens: (B k, P) in the dtype of the result.
        indices: [*PatchIndex, *PackedLayout].

    Returns:
        (L, P).
    """
    # Raises if tensors are not on a GPU and kernels are not interpreted.
    architecture(context.device)
    patches, layout = _split_indices(indices)
    packed = _empty_rows(action_tokens, _num_packed(layout), action_tokens.dtype)
    scatter_launch(packed, layout.context, values=context, table=positions, patch_row=patches.context).run()
    scatter_launch(packed, layout.targets, table=mask_tokens, patch_row=patches.targets).run()
    scatter_launch(packed, layout.action_tokens, values=action_tokens).run()
    return packed.to(action_tokens.dtype)


@copied_input.register_fake
def _(context, positions, mask_tokens, action_tokens, indices):
    return action_tokens.new_empty(_num_packed(_split_indices(indices)[1]), action_tokens.shape[1])


@torch.library.custom_op("iwm_fast::copied_input_backward", mutates_args=())
def _copied_input_backward(
    d_packed: Tensor, mask_tokens: Tensor, indices: Sequence[Tensor], context_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of context, mask_tokens and action_tokens."""
    patches, layout = _split_indices(indices)
    d_packed = d_packed.contiguous()
    d_context = _gather(d_packed, layout.context, context_dtype)
    row_by_patch = _row_table(layout, patches.targets, len(mask_tokens), layout.targets).t()
    d_action_tokens = _gather(d_packed, layout.action_tokens, d_packed.dtype)
    return d_context, _group_sum(d_packed, row_by_patch, mask_tokens.dtype), d_action_tokens


@_copied_input_backward.register_fake
def _(d_packed, mask_tokens, indices, context_dtype):
    width, (_, layout) = d_packed.shape[1], _split_indices(indices)
    d_context = d_packed.new_empty(layout.context.shape[0], width, dtype=context_dtype)
    return d_context, torch.empty_like(mask_tokens), d_packed.new_empty(layout.action_tokens.shape[0], width)


def _copied_setup_context(ctx, inputs, output):
    context, _, mask_tokens, _, indices = inputs
    # Of the mask tokens only shape and dtype are used.
    ctx.save_for_backward(mask_tokens, *indices)
    ctx.context_dtype = context.dtype


def _copied_gradients(ctx, d_packed):
    mask_tokens, *indices = ctx.saved_tensors
    d_context, d_mask_tokens, d_action_tokens = _copied_input_backward(
        d_packed, mask_tokens, indices, ctx.context_dtype
    )
    return d_context, None, d_mask_tokens, d_action_tokens, [None] * len(indices)


copied_input.register_autograd(_copied_gradients, setup_context=_copied_setup_context)


@torch.library.custom_op("iwm_fast::mixed_input", mutates_args=())
def mixed_input(
    context: Tensor, tables: Sequence[Tensor], layers: Sequence[Tensor], indices: Sequence[Tensor], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Pack context + positions[patch] and W3 relu(W2 relu(position_term[patch] + action_term[image]) + b2) + b3.

    Args:
        context: (C, P).
        tables: positions (N, P), constant; position_term (N, P) and action_term (B, P) in the dtype of the sums.
        layers: W2, b2, W3, b3: weights (P, P) in the dtype of the products, biases (P,) in that of the sums.
        indices: [*PatchIndex, *PackedLayout].
        dtype: dtype of the result.

    Returns:
        (L, P), and the second layer's output (T, P), which the backward pass needs.
    """
    architecture(context.device)
    patches, layout = _split_indices(indices)
    positions, position_term, action_term = tables
    w2, b2, w3, b3 = layers
    packed = _empty_rows(context, _num_packed(layout), dtype)
    hidden = _empty_rows(context, len(layout.targets), w2.dtype)
    scatter_launch(packed, layout.context, values=context, table=positions, patch_row=patches.context).run()
    second_launch(hidden, FirstLayer(position_term, action_term, patches.targets), w2, b2).run()
    # In the interpreter this rounds to bfloat16, as a GPU does when it stores the second layer.
    hidden = hidden.to(w2.dtype)
    third_launch(packed, layout.targets, hidden, w3, b3).run()
    return packed.to(dtype), hidden


@mixed_input.register_fake
def _(context, tables, layers, indices, dtype):
    width, (_, layout) = context.shape[1], _split_indices(indices)
    packed = context.new_empty(_num_packed(layout), width, dtype=dtype)
    return packed, context.new_empty(layout.targets.shape[0], width, dtype=layers[0].dtype)


@torch.library.custom_op("iwm_fast::mixed_input_backward", mutates_args=())
def _mixed_input_backward(
    d_packed: Tensor,
    hidden: Tensor,
    terms_and_weights: Sequence[Tensor],
    indices: Sequence[Tensor],
    context_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of context, position_term, action_term, W2, b2, W3 and b3."""
    patches, layout = _split_indices(indices)
    position_term, action_term, w2, w3 = terms_and_weights
    sum_dtype, d_packed = position_term.dtype, d_packed.contiguous()
    # The first layer's output is cheaper to compute again than to keep.
    first = _empty_rows(hidden, len(hidden), hidden.dtype)
    first_launch(first, FirstLayer(position_term, action_term, patches.targets)).run()
    first = first.to(hidden.dtype)
    d_out = _gather(d_packed, layout.targets, hidden.dtype)
    # The backward pass may be called under autocast, which would choose other dtypes.
    with torch.autocast(hidden.device.type, enabled=False):
        d_hidden = torch.ops.aten.threshold_backward(d_out @ w3, hidden, 0)
        d_first = torch.ops.aten.threshold_backward(d_hidden @ w2, first, 0)
        d_w2, d_b2 = d_hidden.t() @ first, d_hidden.sum(0, dtype=sum_dtype)
        d_w3, d_b3 = d_out.t() @ hidden, d_out.sum(0, dtype=sum_dtype)
    target_row = torch.arange(len(hidden), device=hidden.device)
    row_by_image = _row_table(layout, patches.targets, len(position_term), target_row)
    d_position_term = _group_sum(d_first, row_by_image.t(), sum_dtype)
    d_action_term = _group_sum(d_first, row_by_image, sum_dtype)
    d_context = _gather(d_packed, layout.context, context_dtype)
    return d_context, d_position_term, d_action_term, d_w2, d_b2, d_w3, d_b3


@_mixed_input_backward.register_fake
def _(d_packed, hidden, terms_and_weights, indices, context_dtype):
    position_term, action_term, w2, w3 = terms_and_weights
    d_context = d_packed.new_empty(indices[0].shape[0], d_packed.shape[1], dtype=context_dtype)
    d_bias = position_term.new_empty(position_term.shape[1])
    like = torch.empty_like
    return d_context, like(position_term), like(action_term), like(w2), d_bias, like(w3), like(d_bias)


def _mixed_setup_context(ctx, inputs, output):
    context, tables, layers, indices, _ = inputs
    ctx.save_for_backward(output[1], *tables[1:], *layers[::2], *indices)
    ctx.context_dtype = context.dtype


def _mixed_gradients(ctx, d_packed, _):
    hidden, *saved = ctx.saved_tensors
    terms_and_weights, indices = saved[:4], saved[4:]
    d_context, *gradients = _mixed_input_backward(d_packed, hidden, terms_and_weights, indices, ctx.context_dtype)
    return d_context, [None, *gradients[:2]], gradients[2:], [None] * len(indices), None


mixed_input.register_autograd(_mixed_gradients, setup_context=_mixed_setup_context)


def _split_indices(indices: Sequence[Tensor]) -> tuple[PatchIndex, PackedLayout]:
    return PatchIndex(*indices[:2]), PackedLayout(*indices[2:])


def _num_packed(layout: PackedLayout) -> int:
    return layout.context.shape[0] + layout.targets.shape[0] + layout.action_tokens.shape[0]


def _empty_rows(like: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Return uninitialised rows as wide as those of `like`; in the interpreter float32 instead of bfloat16."""
    return upcast_for_interpreter(like.new_empty(num_rows, like.shape[1], dtype=dtype))


def _gather(packed: Tensor, packed_row: Tensor, dtype: torch.dtype) -> Tensor:
    out = _empty_rows(packed, len(packed_row), dtype)
    gather_launch(out, packed, packed_row).run()
    return out.to(dtype)


def _group_sum(values: Tensor, members: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (G, P), the sum of each group's rows; members (G, any number) are row numbers, or -1 for none."""
    out = values.new_empty(len(members), values.shape[1], dtype=dtype)
    group_sum_launch(out, values, members).run()
    return out


def _row_table(layout: PackedLayout, patch_row: Tensor, num_patches: int, row: Tensor) -> Tensor:
    """Return (B, N) int32: the entry of `row` (T,) for each patch of each image, -1 where the patch is no target."""
    num_images = len(layout.offsets) - 1
    table = torch.full((num_images * num_patches,), -1, dtype=torch.int32, device=row.device)
    return table.index_copy_(0, patch_row, row.int()).view(num_images, num_patches)
