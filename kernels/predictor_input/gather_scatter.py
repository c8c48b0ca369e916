"""Kernels that move rows into and out of packed sequences, and add them up by group.

`patch_row` is image * N + patch, `place` a row of the packed sequences. Each function that ends in `_launch` describes
one start of one kernel. Every row of a result is written by one program, and sums run in a fixed order: no atomics.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels.launch import Launch, interpretable

_ROWS = 16
"""Rows of a tile; with 128 columns of float32 four loads of 16 bytes for each of 128 threads."""


@triton.jit
def _tile(num_rows, P: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    # columns in programs of their own, not in a loop: the loads of a later turn would wait for an earlier one's stores
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_row = row < num_rows
    return row, column[None, :], is_row, is_row[:, None] & (column < P)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _place_kernel(
    packed_ptr,  # (L, P)
    place_ptr,  # (M,)
    values_ptr,  # (M, P), or None
    table_ptr,  # (N, P), or None
    patch_row_ptr,  # (M,): rows of the table
    num_rows,
    N: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype: tl.constexpr = packed_ptr.dtype.element_ty
    row, column, is_row, mask = _tile(num_rows, P, ROWS, COLUMNS)
    place = tl.load(place_ptr + row, mask=is_row, other=0)
    if values_ptr is not None:
        value = tl.load(values_ptr + row[:, None] * P + column, mask=mask, other=0.0).to(dtype)
    if table_ptr is not None:
        patch = tl.load(patch_row_ptr + row, mask=is_row, other=0) % N
        entry = tl.load(table_ptr + patch[:, None] * P + column, mask=mask, other=0.0).to(dtype)
        value = entry if values_ptr is None else value + entry
    tl.store(packed_ptr + place[:, None] * P + column, value, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _take_kernel(
    out_ptr,  # (M, P)
    packed_ptr,  # (L, P)
    place_ptr,  # (M,)
    num_rows,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row, column, is_row, mask = _tile(num_rows, P, ROWS, COLUMNS)
    place = tl.load(place_ptr + row, mask=is_row, other=0)
    value = tl.load(packed_ptr + place[:, None] * P + column, mask=mask, other=0.0)
    tl.store(out_ptr + row[:, None] * P + column, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_members", "group_stride", "member_stride"])
def _sum_kernel(
    out_ptr,  # (G, P), in the dtype sums are accumulated in
    rows_ptr,  # (M, P)
    member_ptr,  # (G, members): a row, or -1 for none
    num_members,
    group_stride,
    member_stride,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), out_ptr.dtype.element_ty)
    for start in range(0, num_members, ROWS):
        member = start + tl.arange(0, ROWS)
        entry = group * group_stride + member.to(tl.int64) * member_stride
        row = tl.load(member_ptr + entry, mask=member < num_members, other=-1).to(tl.int64)
        mask = (row >= 0)[:, None] & (column < P)[None, :]
        total += tl.load(rows_ptr + row[:, None] * P + column[None, :], mask=mask, other=0.0).to(total.dtype)
    tl.store(out_ptr + group * P + column, tl.sum(total, axis=0), mask=column < P)


def place_launch(
    packed: Tensor,
    place: Tensor,
    *,
    values: Tensor | None = None,
    table: Tensor | None = None,
    patch_row: Tensor | None = None,
) -> Launch:
    """Compute packed[place] = values + table[patch], where either may be absent.

    Args:
        packed: (L, P).
        place: (M,) int64.
        values: (M, P).
        table: (N, P), with `patch_row`.
        patch_row: (M,) int64.
    """
    arguments = {
        "packed_ptr": packed,
        "place_ptr": place,
        "values_ptr": None if values is None else interpretable(values),
        "table_ptr": None if table is None else interpretable(table),
        "patch_row_ptr": patch_row,
        "num_rows": len(place),
    }
    num_patches = 1 if table is None else len(table)
    return _launch(_place_kernel, arguments, len(place), P=packed.shape[1], N=num_patches)


def take_launch(out: Tensor, packed: Tensor, place: Tensor) -> Launch:
    """Compute out (M, P) = packed[place], in the dtype of `out`."""
    arguments = {"out_ptr": out, "packed_ptr": interpretable(packed), "place_ptr": place, "num_rows": len(place)}
    return _launch(_take_kernel, arguments, len(place), P=out.shape[1])


def sum_launch(out: Tensor, rows: Tensor, members: Tensor) -> Launch:
    """Compute out (G, P): the sum of each group's rows, in order and in the dtype of `out`.

    Args:
        out: (G, P) float32 or wider.
        rows: (M, P).
        members: (G, any number) int32 with any strides: rows, or -1 for none.
    """
    group_stride, member_stride = members.stride()
    arguments = {
        "out_ptr": out,
        "rows_ptr": interpretable(rows),
        "member_ptr": members,
        "num_members": members.shape[1],
        "group_stride": group_stride,
        "member_stride": member_stride,
    }
    return _launch(_sum_kernel, arguments, len(out) * _ROWS, P=out.shape[1])


def _launch(kernel: Any, arguments: dict[str, Any], num_rows: int, **sizes: int) -> Launch:
    # 192 = 3 x 64 and 384 = 3 x 128: neither has idle columns
    columns = 128 if sizes["P"] % 128 == 0 else 64
    grid = triton.cdiv(num_rows, _ROWS), triton.cdiv(sizes["P"], columns)
    return Launch(kernel, grid, arguments, {**sizes, "ROWS": _ROWS, "COLUMNS": columns}, num_warps=4)
