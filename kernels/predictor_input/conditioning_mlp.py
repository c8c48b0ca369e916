"""Kernels of the mixer, a three-layer MLP that conditions mask tokens; its first layer needs no product per row.

`patch_row` is image * N + patch; `packed_row` is a row of the packed sequences. Functions whose names end in `_launch`
return a `Launch` and start nothing. Products are in the dtype of the weights, sums in that of the biases.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels.launch import Launch, upcast_for_interpreter


class FirstLayer(NamedTuple):
    """The mixer's first layer, relu(position_term[patch] + action_term[image]), as the tensors it is computed from.

    Its input is [mask token + position; action], so its product splits into one term per position and one per image.
    """

    position_term: Tensor
    """(N, P), in the dtype of the sums."""
    action_term: Tensor
    """(B, P), in the dtype of the sums."""
    patch_row: Tensor
    """(T,) int64."""


class _TileConfig(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@triton.jit
def _relu(x):
    # Not tl.maximum, which returns 0 for NaN.
    return tl.where(x < 0, 0.0, x)


@triton.jit
def _first_layer(
    position_term_ptr,  # (N, P)
    action_term_ptr,  # (B, P)
    patch_row, column, mask, N: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Return a (rows, columns) tile of the first layer's output."""
    patch, image = patch_row % N, patch_row // N
    position_term = tl.load(position_term_ptr + patch[:, None] * P + column[None, :], mask=mask, other=0.0)
    action_term = tl.load(action_term_ptr + image[:, None] * P + column[None, :], mask=mask, other=0.0)
    return _relu(position_term + action_term)


@triton.jit(do_not_specialize=["num_rows"])
def _first_kernel(
    out_ptr,  # (T, P)
    position_term_ptr,  # (N, P)
    action_term_ptr,  # (B, P)
    patch_row_ptr,  # (T,)
    num_rows, N: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = row < num_rows
    patch_row = tl.load(patch_row_ptr + row, mask=is_row, other=0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = is_row[:, None] & (column < P)[None, :]
    first = _first_layer(position_term_ptr, action_term_ptr, patch_row, column, mask, N, P)
    tl.store(out_ptr + row[:, None] * P + column[None, :], first.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _layer_kernel(
    out_ptr,  # (T, P); with packed_row_ptr (L, P)
    hidden_ptr,  # (T, P); None: the first layer's output, computed on the fly from the three tensors that follow
    position_term_ptr,  # (N, P)
    action_term_ptr,  # (B, P)
    patch_row_ptr,  # (T,)
    weight_ptr,  # (P out, P in)
    bias_ptr,  # (P,) in the dtype of the sums
    packed_row_ptr,  # (T,); None: rows are not scattered and a ReLU follows
    num_rows, N: tl.constexpr, P: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    # Consecutive programs compute different columns of the same rows, whose inputs they then read from the cache.
    num_column_blocks: tl.constexpr = (P + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0).to(tl.int64)
    row = program // num_column_blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    column = program % num_column_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row, is_column = row < num_rows, column < P
    if hidden_ptr is None:
        patch_row = tl.load(patch_row_ptr + row, mask=is_row, other=0)
    total = tl.zeros((BLOCK_M, BLOCK_N), bias_ptr.dtype.element_ty)
    # BLOCK_K divides P, so the inner dimension needs no mask.
    for start in range(0, P, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        if hidden_ptr is None:
            hidden = _first_layer(position_term_ptr, action_term_ptr, patch_row, inner, is_row[:, None], N, P)
        else:
            hidden = tl.load(hidden_ptr + row[:, None] * P + inner[None, :], mask=is_row[:, None], other=0.0)
        weight = tl.load(weight_ptr + column[None, :] * P + inner[:, None], mask=is_column[None, :], other=0.0)
        total = tl.dot(hidden.to(weight.dtype), weight, total, input_precision=INPUT_PRECISION, out_dtype=total.dtype)
    total += tl.load(bias_ptr + column, mask=is_column, other=0.0)[None, :]
    if packed_row_ptr is None:
        out_row = row
        total = _relu(total)
    else:
        out_row = tl.load(packed_row_ptr + row, mask=is_row, other=0)
    mask = is_row[:, None] & is_column[None, :]
    tl.store(out_ptr + out_row[:, None] * P + column[None, :], total.to(out_ptr.dtype.element_ty), mask=mask)


def _tile_config(dtype: torch.dtype, width: int) -> _TileConfig:
    """Return tile sizes that compile without spills and let two programs share a multiprocessor of sm_90."""
    block_k = 32 if width % 32 == 0 else 16
    if dtype.itemsize > 2:
        return _TileConfig(64, 64, block_k, num_warps=4, num_stages=2)
    # Common widths such as 192 = 3 x 64 and 384 = 3 x 128 leave no columns of a tile idle.
    return _TileConfig(128, 128 if width % 128 == 0 else 64, block_k, num_warps=8, num_stages=3)


def first_launch(out: Tensor, first: FirstLayer) -> Launch:
    """Return the launch that writes the first layer's output (T, P), which the forward pass never stores."""
    num_rows, width = out.shape
    arguments = {"out_ptr": out, **_pointers(first), "num_rows": num_rows}
    block_m, block_n = 16, 128 if width % 128 == 0 else 64
    sizes = {"N": len(first.position_term), "P": width}
    constants = {**sizes, "BLOCK_M": block_m, "BLOCK_N": block_n}
    grid = triton.cdiv(num_rows, block_m), triton.cdiv(width, block_n)
    return Launch(_first_kernel, grid, arguments, constants, num_warps=4)


def second_launch(out: Tensor, first: FirstLayer, weight: Tensor, bias: Tensor) -> Launch:
    """Return the launch that computes out (T, P) = relu(first weight^T + bias), with weight (P, P) and bias (P,)."""
    num_patches = len(first.position_term)
    return _layer_launch(out, weight, bias, num_rows=len(out), num_patches=num_patches, **_pointers(first))


def third_launch(packed: Tensor, packed_row: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor) -> Launch:
    """Return the launch that computes packed[packed_row] (T, P) = hidden weight^T + bias, with packed (L, P)."""
    pointers = {"hidden_ptr": upcast_for_interpreter(hidden), "packed_row_ptr": packed_row}
    return _layer_launch(packed, weight, bias, num_rows=len(hidden), num_patches=1, **pointers)


def _layer_launch(
    out: Tensor, weight: Tensor, bias: Tensor, *, num_rows: int, num_patches: int, **pointers: Tensor
) -> Launch:
    width = len(bias)
    config = _tile_config(weight.dtype, width)
    absent = dict.fromkeys(("hidden_ptr", "position_term_ptr", "action_term_ptr", "patch_row_ptr", "packed_row_ptr"))
    arguments = absent | pointers | {"out_ptr": out, "weight_ptr": upcast_for_interpreter(weight), "bias_ptr": bias}
    constants = {
        "N": num_patches,
        "P": width,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        # A float32 product is computed as three tf32 products, which is exact to about its last bit.
        "INPUT_PRECISION": "tf32x3" if weight.dtype == torch.float32 else "ieee",
    }
    grid = (triton.cdiv(num_rows, config.block_m) * triton.cdiv(width, config.block_n),)
    arguments |= {"num_rows": num_rows}
    return Launch(_layer_kernel, grid, arguments, constants, config.num_warps, config.num_stages)


def _pointers(first: FirstLayer) -> dict[str, Tensor]:
    return {
        "position_term_ptr": first.position_term,
        "action_term_ptr": first.action_term,
        "patch_row_ptr": first.patch_row,
    }
