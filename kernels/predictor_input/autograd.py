"""The predictor's input as two operations of torch: target rows copied from a table, or made by the mixer.

Both are opaque to the compiler on purpose: a new number of rows is no new graph. `rows` is
[*PatchIndex, *PackedLayout].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from iwm_fast.kernels.launch import architecture, interpretable
from iwm_fast.kernels.predictor_input.conditioning_mlp import FirstLayer, first_launch, second_launch, third_launch
from iwm_fast.kernels.predictor_input.gather_scatter import place_launch, sum_launch, take_launch
from iwm_fast.kernels.predictor_input.layout import PackedLayout, PatchIndex


@torch.library.custom_op("iwm_fast::copied_input", mutates_args=())
def copied_input(
    context: Tensor, positions: Tensor, table: Tensor, action_tokens: Tensor, rows: Sequence[Tensor]
) -> Tensor:
    """Pack context + positions[patch], table[patch] and action tokens.

    Args:
        context: (C, P).
        positions: (N, P), constant.
        table: (N, P), what target rows are copied from.
        action_tokens: (B k, P) in the dtype of the result.
        rows: see the module.

    Returns:
        (L, P).
    """
    architecture(context.device)
    patches, places = _split(rows)
    packed = _new(action_tokens, _num_packed(places), action_tokens.dtype)
    place_launch(packed, places.context, values=context, table=positions, patch_row=patches.context).run()
    place_launch(packed, places.targets, table=table, patch_row=patches.targets).run()
    place_launch(packed, places.action_tokens, values=action_tokens).run()
    return packed.to(action_tokens.dtype)


@copied_input.register_fake
def _(context, positions, table, action_tokens, rows):
    return action_tokens.new_empty(_num_packed(_split(rows)[1]), action_tokens.shape[1])


@torch.library.custom_op("iwm_fast::copied_input_backward", mutates_args=())
def _copied_backward(
    d_packed: Tensor, table: Tensor, rows: Sequence[Tensor], context_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    patches, places = _split(rows)
    d_packed = d_packed.contiguous()
    d_context = _take(d_packed, places.context, context_dtype)
    by_patch = _members(places, patches.targets, len(table), places.targets).t()
    d_action_tokens = _take(d_packed, places.action_tokens, d_packed.dtype)
    return d_context, _sums(d_packed, by_patch, table.dtype), d_action_tokens


@_copied_backward.register_fake
def _(d_packed, table, rows, context_dtype):
    width, (_, places) = d_packed.shape[1], _split(rows)
    d_context = d_packed.new_empty(places.context.shape[0], width, dtype=context_dtype)
    return d_context, torch.empty_like(table), d_packed.new_empty(places.action_tokens.shape[0], width)


def _keep_copied(ctx, inputs, output):
    context, _, table, _, rows = inputs
    ctx.save_for_backward(table, *rows)
    ctx.context_dtype = context.dtype


def _backward_copied(ctx, d_packed):
    table, *rows = ctx.saved_tensors
    d_context, d_table, d_action_tokens = _copied_backward(d_packed, table, rows, ctx.context_dtype)
    return d_context, None, d_table, d_action_tokens, [None] * len(rows)


copied_input.register_autograd(_backward_copied, setup_context=_keep_copied)


@torch.library.custom_op("iwm_fast::mixed_input", mutates_args=())
def mixed_input(
    context: Tensor, tables: Sequence[Tensor], layers: Sequence[Tensor], rows: Sequence[Tensor], stream: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Pack context + positions[patch] and W3 relu(W2 relu(by_position[patch] + by_sample[image]) + b2) + b3.

    Args:
        context: (C, P).
        tables: positions (N, P), constant; by_position (N, P) and by_sample (B, P) in the dtype of sums.
        layers: W2, b2, W3, b3: weights (P, P) in the dtype of products, biases (P,) in that of sums.
        rows: see the module.
        stream: dtype of the result.

    Returns:
        (L, P) and, for the backward pass, the second layer's (T, P).
    """
    architecture(context.device)
    patches, places = _split(rows)
    positions, by_position, by_sample = tables
    w2, b2, w3, b3 = layers
    packed = _new(context, _num_packed(places), stream)
    hidden = _new(context, len(places.targets), w2.dtype)
    place_launch(packed, places.context, values=context, table=positions, patch_row=patches.context).run()
    second_launch(hidden, FirstLayer(by_position, by_sample, patches.targets), w2, b2).run()
    hidden = hidden.to(w2.dtype)
    third_launch(packed, places.targets, hidden, w3, b3).run()
    return packed.to(stream), hidden


@mixed_input.register_fake
def _(context, tables, layers, rows, stream):
    width, (_, places) = context.shape[1], _split(rows)
    packed = context.new_empty(_num_packed(places), width, dtype=stream)
    return packed, context.new_empty(places.targets.shape[0], width, dtype=layers[0].dtype)


@torch.library.custom_op("iwm_fast::mixed_input_backward", mutates_args=())
def _mixed_backward(
    d_packed: Tensor,
    hidden: Tensor,
    factors: Sequence[Tensor],
    rows: Sequence[Tensor],
    context_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    patches, places = _split(rows)
    by_position, by_sample, w2, w3 = factors
    sums, d_packed = by_position.dtype, d_packed.contiguous()
    first = _new(hidden, len(hidden), hidden.dtype)
    first_launch(first, FirstLayer(by_position, by_sample, patches.targets)).run()
    first = first.to(hidden.dtype)
    d_out = _take(d_packed, places.targets, hidden.dtype)
    # backward may be called under autocast, which would choose other dtypes
    with torch.autocast(hidden.device.type, enabled=False):
        d_hidden = torch.ops.aten.threshold_backward(d_out @ w3, hidden, 0)
        d_first = torch.ops.aten.threshold_backward(d_hidden @ w2, first, 0)
        d_w2, d_b2 = d_hidden.t() @ first, d_hidden.sum(0, dtype=sums)
        d_w3, d_b3 = d_out.t() @ hidden, d_out.sum(0, dtype=sums)
    row = torch.arange(len(hidden), device=hidden.device)
    by_image = _members(places, patches.targets, len(by_position), row)
    d_context = _take(d_packed, places.context, context_dtype)
    return d_context, _sums(d_first, by_image.t(), sums), _sums(d_first, by_image, sums), d_w2, d_b2, d_w3, d_b3


@_mixed_backward.register_fake
def _(d_packed, hidden, factors, rows, context_dtype):
    by_position, by_sample, w2, w3 = factors
    d_context = d_packed.new_empty(rows[0].shape[0], d_packed.shape[1], dtype=context_dtype)
    d_bias = by_position.new_empty(by_position.shape[1])
    like = torch.empty_like
    return d_context, like(by_position), like(by_sample), like(w2), d_bias, like(w3), like(d_bias)


def _keep_mixed(ctx, inputs, output):
    context, tables, layers, rows, _ = inputs
    ctx.save_for_backward(output[1], *tables[1:], *layers[::2], *rows)
    ctx.context_dtype = context.dtype


def _backward_mixed(ctx, d_packed, _):
    hidden, *saved = ctx.saved_tensors
    factors, rows = saved[:4], saved[4:]
    d_context, *gradients = _mixed_backward(d_packed, hidden, factors, rows, ctx.context_dtype)
    return d_context, [None, *gradients[:2]], gradients[2:], [None] * len(rows), None


mixed_input.register_autograd(_backward_mixed, setup_context=_keep_mixed)


def _split(rows: Sequence[Tensor]) -> tuple[PatchIndex, PackedLayout]:
    return PatchIndex(*rows[:2]), PackedLayout(*rows[2:])


def _num_packed(places: PackedLayout) -> int:
    return places.context.shape[0] + places.targets.shape[0] + places.action_tokens.shape[0]


def _new(like: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    return interpretable(like.new_empty(num_rows, like.shape[1], dtype=dtype))


def _take(packed: Tensor, place: Tensor, dtype: torch.dtype) -> Tensor:
    out = _new(packed, len(place), dtype)
    take_launch(out, packed, place).run()
    return out.to(dtype)


def _sums(rows: Tensor, members: Tensor, dtype: torch.dtype) -> Tensor:
    out = rows.new_empty(len(members), rows.shape[1], dtype=dtype)
    sum_launch(out, rows, members).run()
    return out


def _members(places: PackedLayout, patch_row: Tensor, num_patches: int, row: Tensor) -> Tensor:
    """Return (B, N) int32: the row that stands for a patch of an image, -1 where none does."""
    num_images = len(places.offsets) - 1
    members = torch.full((num_images * num_patches,), -1, dtype=torch.int32, device=row.device)
    return members.index_copy_(0, patch_row, row.int()).view(num_images, num_patches)
