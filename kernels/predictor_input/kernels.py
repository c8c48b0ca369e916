"""Kernels that combine, move and sum rows of the predictor's input.

`patch_row` is image * N + patch; `packed_row` is a row of the packed sequences. Functions whose names end in `_launch`
return a `Launch` and start nothing. Every row of a result is written by one program, and sums are taken in a fixed
order, so no atomics are needed.
"""

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels.launch import Launch

# Rows of a tile. With 128 columns of float32, each of 128 threads loads 16 bytes four times.
_BLOCK_M = 16


@triton.jit
def _locate_tile(num_rows, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return rows, columns, whether a row exists, and whether an element exists, for this program's tile."""
    # Blocks of columns are separate programs and not iterations of a loop, where the loads of an iteration would wait
    # for the stores of the one before.
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row = row < num_rows
    return row, column[None, :], is_row, is_row[:, None] & (column < P)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _combine_kernel(
    out_ptr,  # (M, P)
    by_patch_ptr,  # (N, P)
    by_image_ptr,  # (B, P); None: no term of the image and no ReLU
    patch_row_ptr,  # (M,)
    num_rows, N: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, column, is_row, mask = _locate_tile(num_rows, P, BLOCK_M, BLOCK_N)
    patch_row = tl.load(patch_row_ptr + row, mask=is_row, other=0)
    value = tl.load(by_patch_ptr + (patch_row % N)[:, None] * P + column, mask=mask, other=0.0)
    if by_image_ptr is not None:
        value += tl.load(by_image_ptr + (patch_row // N)[:, None] * P + column, mask=mask, other=0.0)
        # Not tl.maximum, which returns 0 for NaN.
        value = tl.where(value < 0, 0.0, value)
    tl.store(out_ptr + row[:, None] * P + column, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_members", "group_stride", "member_stride"])
def _group_sum_kernel(
    out_ptr,  # (G, P), in the dtype of the sums
    values_ptr,  # (M, P)
    gate_ptr,  # (M, P): values count where this is above 0; None: all count
    member_ptr,  # (G, members): a row of the values, or -1 for none
    num_members, group_stride, member_stride, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_M, BLOCK_N), out_ptr.dtype.element_ty)
    for start in range(0, num_members, BLOCK_M):
        member = start + tl.arange(0, BLOCK_M)
        entry = group * group_stride + member.to(tl.int64) * member_stride
        row = tl.load(member_ptr + entry, mask=member < num_members, other=-1).to(tl.int64)
        mask = (row >= 0)[:, None] & (column < P)[None, :]
        offset = row[:, None] * P + column[None, :]
        value = tl.load(values_ptr + offset, mask=mask, other=0.0)
        if gate_ptr is not None:
            # As in torch's ReLU: a NaN lets the gradient pass.
            value = tl.where(tl.load(gate_ptr + offset, mask=mask, other=0.0) <= 0, 0.0, value)
        total += value.to(total.dtype)
    tl.store(out_ptr + group * P + column, tl.sum(total, axis=0), mask=column < P)


@triton.jit(do_not_specialize=["num_rows"])
def _scatter_kernel(
    packed_ptr,  # (L, P)
    packed_row_ptr,  # (M,)
    values_ptr,  # (M, P)
    table_ptr,  # (N, P), added to the values, or None
    patch_row_ptr,  # (M,), used with the table
    num_rows, N: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = packed_ptr.dtype.element_ty
    row, column, is_row, mask = _locate_tile(num_rows, P, BLOCK_M, BLOCK_N)
    packed_row = tl.load(packed_row_ptr + row, mask=is_row, other=0)
    value = tl.load(values_ptr + row[:, None] * P + column, mask=mask, other=0.0).to(dtype)
    if table_ptr is not None:
        patch = tl.load(patch_row_ptr + row, mask=is_row, other=0) % N
        value += tl.load(table_ptr + patch[:, None] * P + column, mask=mask, other=0.0).to(dtype)
    tl.store(packed_ptr + packed_row[:, None] * P + column, value, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _gather_kernel(
    out_ptr,  # (M, P)
    packed_ptr,  # (L, P)
    packed_row_ptr,  # (M,)
    num_rows, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row, column, is_row, mask = _locate_tile(num_rows, P, BLOCK_M, BLOCK_N)
    packed_row = tl.load(packed_row_ptr + row, mask=is_row, other=0)
    value = tl.load(packed_ptr + packed_row[:, None] * P + column, mask=mask, other=0.0)
    tl.store(out_ptr + row[:, None] * P + column, value.to(out_ptr.dtype.element_ty), mask=mask)


def combine_launch(out: Tensor, by_patch: Tensor, by_image: Tensor | None, patch_row: Tensor) -> Launch:
    """Return the launch that computes out (M, P) = relu(by_patch (N, P)[patch] + by_image (B, P)[image]).

    Without `by_image` it is by_patch[patch], without a ReLU; `patch_row` is (M,) int64.
    """
    arguments = (out, by_patch, by_image, patch_row, len(out))
    return _launch(_combine_kernel, arguments, len(out), P=out.shape[1], N=len(by_patch))


def group_sum_launch(out: Tensor, values: Tensor, gate: Tensor | None, members: Tensor) -> Launch:
    """Return the launch that sums the rows of each group into a row of `out`, in the dtype of `out`.

    Args:
        out: (G, P) float32 or wider, written.
        values: (M, P).
        gate: (M, P), output of the ReLU whose input's gradient is summed, or None.
        members: (G, any number) int32 with any strides: rows of `values`, or -1 for none.
    """
    arguments = (out, values, gate, members, members.shape[1], *members.stride())
    # A group has a program of its own, hence a grid as for _BLOCK_M times as many rows.
    return _launch(_group_sum_kernel, arguments, len(out) * _BLOCK_M, P=out.shape[1])


def scatter_launch(
    packed: Tensor, packed_row: Tensor, values: Tensor, table: Tensor | None = None, patch_row: Tensor | None = None
) -> Launch:
    """Return the launch that computes packed (L, P)[packed_row] = values (M, P) + table (N, P)[patch].

    Without a table it is the values alone; `packed_row` and `patch_row`, which a table needs, are (M,) int64.
    """
    arguments = (packed, packed_row, values, table, patch_row, len(packed_row))
    num_patches = 1 if table is None else len(table)
    return _launch(_scatter_kernel, arguments, len(packed_row), P=packed.shape[1], N=num_patches)


def gather_launch(out: Tensor, packed: Tensor, packed_row: Tensor) -> Launch:
    """Return the launch that computes out (M, P) = packed (L, P)[packed_row], in the dtype of `out`."""
    return _launch(_gather_kernel, (out, packed, packed_row, len(out)), len(out), P=out.shape[1])


def _launch(kernel: Any, arguments: Sequence[Tensor | int | None], num_rows: int, **sizes: int) -> Launch:
    """Return a launch over rows and columns; the arguments are in the order of the kernel's parameters."""
    # Common widths such as 192 = 3 x 64 and 384 = 3 x 128 leave no columns of a tile idle.
    block_n = 128 if sizes["P"] % 128 == 0 else 64
    grid = triton.cdiv(num_rows, _BLOCK_M), triton.cdiv(sizes["P"], block_n)
    constants = {**sizes, "BLOCK_M": _BLOCK_M, "BLOCK_N": block_n}
    return Launch.of(kernel, grid, arguments, constants, num_warps=4)
