"""The two fused parts of the predictor's input, with their gradients: combining rows, and placing rows."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from iwm_fast.kernels.launch import architecture, register_op, upcast_for_interpreter
from iwm_fast.kernels.predictor_input.kernels import combine_launch, gather_launch, group_sum_launch, scatter_launch


def _new_rows(like: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """Return uninitialised rows as wide as those of `like`."""
    return like.new_empty(num_rows, like.shape[1], dtype=dtype)


def _combine(by_patch: Tensor, by_image: Tensor | None, patch_row: Tensor, dtype: torch.dtype) -> Tensor:
    # Raises if tensors are not on a GPU and kernels are not interpreted.
    architecture(by_patch.device)
    out = upcast_for_interpreter(_new_rows(by_patch, len(patch_row), dtype))
    combine_launch(out, by_patch, by_image, patch_row).run()
    return out.to(dtype)


def _combine_backward(
    d_out: Tensor, gate: Tensor | None, patch_row: Tensor, sizes: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """Return the gradient of by_patch and, if there is a gate (the ReLU's output), that of by_image.

    `sizes` are the numbers of patch positions and images.
    """
    num_patches, num_images = sizes
    values = upcast_for_interpreter(d_out.contiguous())
    gate = None if gate is None else upcast_for_interpreter(gate)
    # The row of each patch of each image, (B, N), or -1 where the patch is not among the rows.
    table = torch.full((num_images * num_patches,), -1, dtype=torch.int32, device=patch_row.device)
    row = torch.arange(len(patch_row), dtype=torch.int32, device=patch_row.device)
    by_image = table.index_copy_(0, patch_row, row).view(num_images, num_patches)
    gradients = []
    for members in (by_image.t(),) if gate is None else (by_image.t(), by_image):
        gradients.append(values.new_empty(len(members), values.shape[1], dtype=dtype))
        group_sum_launch(gradients[-1], values, gate, members).run()
    return gradients


_combine_op = register_op(
    "combine_rows(Tensor by_patch, Tensor? by_image, Tensor patch_row, ScalarType dtype) -> Tensor",
    _combine,
    lambda by_patch, by_image, patch_row, dtype: _new_rows(by_patch, patch_row.shape[0], dtype),
)
_combine_backward_op = register_op(
    "combine_rows_backward(Tensor d_out, Tensor? gate, Tensor patch_row, SymInt[] sizes, ScalarType dtype) -> Tensor[]",
    _combine_backward,
    lambda d_out, gate, patch_row, sizes, dtype: [
        _new_rows(d_out, size, dtype) for size in sizes[: 1 if gate is None else 2]
    ],
)


class CombineRows(torch.autograd.Function):
    """relu(by_patch[patch] + by_image[image]), (T, P) in `dtype`, for each entry of `patch_row`.

    Args:
        by_patch: (N, P) float32 or wider, one row per patch position.
        by_image: (B, P) in the same dtype; None for by_patch[patch] without a ReLU.
        patch_row: (T,) int64, image * N + patch; no entry occurs twice.
        num_images: number of images, B.
        dtype: dtype of the result.
    """

    @staticmethod
    def forward(
        ctx: Any, by_patch: Tensor, by_image: Tensor | None, patch_row: Tensor, num_images: int, dtype: torch.dtype
    ) -> Tensor:
        out = _combine_op(by_patch, by_image, patch_row, dtype)
        ctx.save_for_backward(None if by_image is None else out, patch_row)
        ctx.sizes, ctx.dtype = [len(by_patch), num_images], by_patch.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        d_by_patch, *d_by_image = _combine_backward_op(*d_outputs, *ctx.saved_tensors, ctx.sizes, ctx.dtype)
        return d_by_patch, *(d_by_image or [None]), None, None, None


def _place(
    values: Sequence[Tensor], packed_rows: Sequence[Tensor], positions: Tensor, patch_row: Tensor, dtype: torch.dtype
) -> Tensor:
    architecture(positions.device)
    packed = upcast_for_interpreter(_new_rows(positions, sum(map(len, values)), dtype))
    tables = [(upcast_for_interpreter(positions), patch_row)] + [(None, None)] * (len(values) - 1)
    for rows, packed_row, table in zip(values, packed_rows, tables, strict=True):
        scatter_launch(packed, packed_row, upcast_for_interpreter(rows), *table).run()
    return packed.to(dtype)


def _gather(packed: Tensor, packed_row: Tensor, dtype: torch.dtype) -> Tensor:
    out = upcast_for_interpreter(_new_rows(packed, len(packed_row), dtype))
    gather_launch(out, upcast_for_interpreter(packed.contiguous()), packed_row).run()
    return out.to(dtype)


_place_op = register_op(
    "place_rows(Tensor[] values, Tensor[] packed_rows, Tensor positions, Tensor patch_row, ScalarType dtype) -> Tensor",
    _place,
    lambda values, packed_rows, positions, patch_row, dtype: _new_rows(
        positions, sum(rows.shape[0] for rows in values), dtype
    ),
)
_gather_op = register_op(
    "gather_rows(Tensor packed, Tensor packed_row, ScalarType dtype) -> Tensor",
    _gather,
    lambda packed, packed_row, dtype: _new_rows(packed, packed_row.shape[0], dtype),
)


class PlaceRows(torch.autograd.Function):
    """Packed rows (L, P): those of the first values with their positions added, and all others as they are.

    Args:
        packed_rows: for each of the values, int64, the packed row of each of its rows; together a permutation of all L.
        positions: (N, P), constant.
        patch_row: (C,) int64, image * N + patch of the rows of the first values.
        dtype: dtype of the result.
        values: the first is (C, P) and gets positions[patch] added; more, each (any number, P), may follow.
    """

    @staticmethod
    def forward(
        ctx: Any,
        packed_rows: Sequence[Tensor],
        positions: Tensor,
        patch_row: Tensor,
        dtype: torch.dtype,
        *values: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(*packed_rows)
        ctx.dtypes = [rows.dtype for rows in values]
        return _place_op(values, packed_rows, positions, patch_row, dtype)

    @staticmethod
    def backward(ctx: Any, *d_outputs: Tensor) -> tuple[Tensor | None, ...]:
        saved = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad[4:], strict=True)
        gradients = (_gather_op(*d_outputs, rows, dtype) if is_needed else None for rows, dtype, is_needed in saved)
        return None, None, None, None, *gradients
