"""Kernels of the predictor's mixer: three layers of which the first needs no product per row.

`patch_row` is image * N + patch, `place` a row of the packed sequences. Each function that ends in `_launch` describes
one start of one kernel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels.launch import Launch, interpretable


class FirstLayer(NamedTuple):
    """The mixer's first layer, relu(by_position[patch] + by_sample[image]), as what it is made from."""

    by_position: Tensor
    """(N, P), in the dtype sums are accumulated in."""
    by_sample: Tensor
    """(B, P), likewise."""
    patch_row: Tensor
    """(T,) int64."""


class _Tile(NamedTuple):
    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


@triton.jit
def _relu(x):
    # a maximum would hide NaN
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _first_layer(by_position_ptr, by_sample_ptr, patch_row, column, mask, N: tl.constexpr, P: tl.constexpr):
    patch, image = patch_row % N, patch_row // N
    by_position = tl.load(by_position_ptr + patch[:, None] * P + column[None, :], mask=mask, other=0.0)
    by_sample = tl.load(by_sample_ptr + image[:, None] * P + column[None, :], mask=mask, other=0.0)
    return _relu(by_position + by_sample)


@triton.jit(do_not_specialize=["num_rows"])
def _first_kernel(
    out_ptr,  # (T, P)
    by_position_ptr,  # (N, P)
    by_sample_ptr,  # (B, P)
    patch_row_ptr,  # (T,)
    num_rows,
    N: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < num_rows
    patch_row = tl.load(patch_row_ptr + row, mask=is_row, other=0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    mask = is_row[:, None] & (column < P)[None, :]
    first = _first_layer(by_position_ptr, by_sample_ptr, patch_row, column, mask, N, P)
    tl.store(out_ptr + row[:, None] * P + column[None, :], first.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _layer_kernel(
    out_ptr,  # (T, P); with place_ptr (L, P)
    hidden_ptr,  # (T, P); None: the first layer, which is made on the way from the three that follow
    by_position_ptr,  # (N, P)
    by_sample_ptr,  # (B, P)
    patch_row_ptr,  # (T,)
    weight_ptr,  # (P out, P in)
    bias_ptr,  # (P,) in the dtype sums are accumulated in
    place_ptr,  # (T,); None: rows stay where they are and a ReLU follows
    num_rows,
    N: tl.constexpr,
    P: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,  # divides P
    PRECISION: tl.constexpr,
):
    # neighbours compute other columns of the same rows, whose operand they read from the cache
    column_blocks: tl.constexpr = (P + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0).to(tl.int64)
    row = program // column_blocks * ROWS + tl.arange(0, ROWS)
    column = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    is_row, is_column = row < num_rows, column < P
    if hidden_ptr is None:
        patch_row = tl.load(patch_row_ptr + row, mask=is_row, other=0)
    total = tl.zeros((ROWS, COLUMNS), bias_ptr.dtype.element_ty)
    for start in range(0, P, INNER):
        inner = start + tl.arange(0, INNER)
        if hidden_ptr is None:
            hidden = _first_layer(by_position_ptr, by_sample_ptr, patch_row, inner, is_row[:, None], N, P)
        else:
            hidden = tl.load(hidden_ptr + row[:, None] * P + inner[None, :], mask=is_row[:, None], other=0.0)
        weight = tl.load(weight_ptr + column[None, :] * P + inner[:, None], mask=is_column[None, :], other=0.0)
        total = tl.dot(hidden.to(weight.dtype), weight, total, input_precision=PRECISION, out_dtype=total.dtype)
    total += tl.load(bias_ptr + column, mask=is_column, other=0.0)[None, :]
    if place_ptr is None:
        place = row
        total = _relu(total)
    else:
        place = tl.load(place_ptr + row, mask=is_row, other=0)
    mask = is_row[:, None] & is_column[None, :]
    tl.store(out_ptr + place[:, None] * P + column[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


def _tile(dtype: torch.dtype, width: int) -> _Tile:
    """Choose by what the compiler reports: no spills, two programs per multiprocessor on sm_90."""
    # 192 = 3 x 64 and 384 = 3 x 128: neither has columns computed for nothing
    inner = 32 if width % 32 == 0 else 16
    if dtype.itemsize > 2:
        return _Tile(rows=64, columns=64, inner=inner, warps=4, stages=2)
    return _Tile(rows=128, columns=128 if width % 128 == 0 else 64, inner=inner, warps=8, stages=3)


def first_launch(out: Tensor, first: FirstLayer) -> Launch:
    """Compute out (T, P) = the first layer's result, which the backward pass needs once more."""
    num_rows, width = out.shape
    arguments = {"out_ptr": out, **_pointers(first), "num_rows": num_rows}
    rows, columns = 16, 128 if width % 128 == 0 else 64
    constants = {"N": len(first.by_position), "P": width, "ROWS": rows, "COLUMNS": columns}
    grid = triton.cdiv(num_rows, rows), triton.cdiv(width, columns)
    return Launch(_first_kernel, grid, arguments, constants, num_warps=4)


def second_launch(out: Tensor, first: FirstLayer, weight: Tensor, bias: Tensor) -> Launch:
    """Compute out (T, P) = relu(first weight^T + bias); products in `weight`'s dtype, sums in that of `bias`."""
    return _layer_launch(out, weight, bias, num_rows=len(out), num_patches=len(first.by_position), **_pointers(first))


def third_launch(packed: Tensor, place: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Launch:
    """Compute packed[place] = hidden weight^T + bias; products in `weight`'s dtype, sums in that of `bias`."""
    pointers = {"hidden_ptr": interpretable(hidden), "place_ptr": place}
    return _layer_launch(packed, weight, bias, num_rows=len(hidden), num_patches=1, **pointers)


def _layer_launch(
    out: Tensor, weight: Tensor, bias: Tensor, *, num_rows: int, num_patches: int, **pointers: Tensor
) -> Launch:
    width = len(bias)
    tile = _tile(weight.dtype, width)
    absent = dict.fromkeys(("hidden_ptr", "by_position_ptr", "by_sample_ptr", "patch_row_ptr", "place_ptr"))
    arguments = absent | pointers | {"out_ptr": out, "weight_ptr": interpretable(weight), "bias_ptr": bias}
    constants = {
        "N": num_patches,
        "P": width,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "INNER": tile.inner,
        # float32 as three tensor-core products of its parts: exact to about its last bit
        "PRECISION": "tf32x3" if weight.dtype == torch.float32 else "ieee",
    }
    grid = (triton.cdiv(num_rows, tile.rows) * triton.cdiv(width, tile.columns),)
    return Launch(_layer_kernel, grid, arguments | {"num_rows": num_rows}, constants, tile.warps, tile.stages)


def _pointers(first: FirstLayer) -> dict[str, Tensor]:
    return {
        "by_position_ptr": first.by_position,
        "by_sample_ptr": first.by_sample,
        "patch_row_ptr": first.patch_row,
    }
