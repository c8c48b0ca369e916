"""Attention over sequences of any length: tiles of queries against tiles of keys, with a running softmax.

These kernels compute what those of `short` cannot hold on a multiprocessor: long sequences, and float32, whose tiles
are twice as large. One program computes one tile of queries (output, dQ) or of keys (dK and dV), so no program adds to
another one's result and no atomics are needed. The price is that the backward pass recomputes the attention weights
twice: seven matrix products instead of five.
"""

# Type checkers do not know that device code is compiled, where a constexpr parameter is a number.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels.attention.packed import LOG2_E, PackedQKV, load_rows, sequence_span, store_rows
from iwm_fast.kernels.launch import Launch


class TileConfig(NamedTuple):
    """Tile sizes and compiler options of one kernel."""

    block_m: int
    """Rows that a program computes: queries in the forward and dQ kernels, keys in the dK and dV kernel."""
    block_n: int
    """Rows of the other side, keys or queries, that are loaded in each iteration of the loop."""
    num_warps: int
    num_stages: int


class FlashConfig(NamedTuple):
    """Tile sizes of the three kernels."""

    forward: TileConfig
    d_query: TileConfig
    d_key: TileConfig


# Tiles that compile without spills, by architecture; 0 stands for all others. `python -m benchmarks.kernels` prints
# registers and shared memory of each.
_HALF_PRECISION_CONFIGS = {
    90: FlashConfig(TileConfig(128, 64, 8, 2), TileConfig(64, 64, 4, 2), TileConfig(64, 64, 4, 2)),
    0: FlashConfig(TileConfig(128, 64, 8, 3), TileConfig(64, 32, 4, 2), TileConfig(64, 32, 4, 2)),
}
# A float32 product is computed as three tf32 products, whose operands leave few registers for larger tiles.
_FLOAT32_CONFIG = FlashConfig(TileConfig(16, 32, 4, 1), TileConfig(16, 32, 4, 1), TileConfig(16, 32, 4, 1))


@triton.jit
def _locate_tile(offsets_ptr, longest, num_heads, LIMITS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return this program's head, its sequence's first row and length, and the first row of its tile in the sequence.

    The length is returned as 0 if the kernels of `short` compute this sequence.
    """
    # offsets_ptr: (B + 1,) int32, or None
    # Consecutive programs take the tiles of one head, so that the keys they share are read from the cache.
    num_tiles = (longest + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0).to(tl.int64)
    sequence_and_head = program // num_tiles
    sequence_start, length = sequence_span(offsets_ptr, sequence_and_head // num_heads, longest)
    tile_start = ((program % num_tiles) * BLOCK_M).to(tl.int32)
    if length <= LIMITS[0]:
        # The product, unlike a plain 0, keeps the variable's type, which must not depend on the branch.
        length = length * 0
    return sequence_and_head % num_heads, sequence_start, length, tile_start


@triton.jit(do_not_specialize=["longest", "num_heads", "num_rows"])
def _forward_kernel(
    qkv_ptr,  # (rows, 3, H, d)
    offsets_ptr,  # (B + 1,) int32, or None
    out_ptr,  # (rows, H, d)
    lse_ptr,  # (H, rows): log2 of the softmax's denominator
    longest, num_heads, num_rows,
    HEAD_DIM: tl.constexpr, LIMITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr, SUM_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    head, sequence_start, length, tile_start = _locate_tile(offsets_ptr, longest, num_heads, LIMITS, BLOCK_M)
    # The grid has tiles for a sequence of `longest` rows; shorter sequences leave some of them empty.
    if tile_start >= length:
        return
    width = num_heads * HEAD_DIM
    query_ptr = qkv_ptr + sequence_start * 3 * width + head * HEAD_DIM
    query = load_rows(query_ptr, tile_start, length, 3 * width, BLOCK_M, HEAD_DIM, False)
    row_max = tl.full((BLOCK_M,), float("-inf"), SUM_DTYPE)
    row_sum = tl.zeros((BLOCK_M,), SUM_DTYPE)
    out = tl.zeros((BLOCK_M, HEAD_DIM), SUM_DTYPE)
    for key_start in range(0, length, BLOCK_N):
        key = load_rows(query_ptr + width, key_start, length, 3 * width, BLOCK_N, HEAD_DIM, False)
        value = load_rows(query_ptr + 2 * width, key_start, length, 3 * width, BLOCK_N, HEAD_DIM, False)
        score = tl.dot(query, tl.trans(key), out_dtype=SUM_DTYPE, input_precision=INPUT_PRECISION) * (SCALE * LOG2_E)
        is_key = key_start + tl.arange(0, BLOCK_N) < length
        score = tl.where(is_key[None, :], score, float("-inf"))
        # Finite from the first iteration on, since each tile holds a key: -inf - (-inf) below would be NaN.
        new_max = tl.maximum(row_max, tl.max(score, 1))
        weight = tl.exp2(score - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(weight, 1)
        out = out * rescale[:, None]
        out = tl.dot(weight.to(value.dtype), value, out, out_dtype=SUM_DTYPE, input_precision=INPUT_PRECISION)
        row_max = new_max
    out_base_ptr = out_ptr + sequence_start * width + head * HEAD_DIM
    store_rows(out_base_ptr, out / row_sum[:, None], tile_start, length, width)
    row = tile_start + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + head * num_rows + sequence_start + row, row_max + tl.log2(row_sum), mask=row < length)


@triton.jit(do_not_specialize=["longest", "num_heads", "num_rows"])
def _d_query_kernel(
    qkv_ptr,  # (rows, 3, H, d)
    offsets_ptr,  # (B + 1,) int32, or None
    out_ptr,  # (rows, H, d)
    d_out_ptr,  # (rows, H, d)
    d_qkv_ptr,  # (rows, 3, H, d): only dQ is written
    lse_ptr,  # (H, rows): log2 of the softmax's denominator
    delta_ptr,  # (H, rows): sum(out * d_out) of each row, written for `_d_key_kernel`
    longest, num_heads, num_rows,
    HEAD_DIM: tl.constexpr, LIMITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr, SUM_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    head, sequence_start, length, tile_start = _locate_tile(offsets_ptr, longest, num_heads, LIMITS, BLOCK_M)
    if tile_start >= length:
        return
    width = num_heads * HEAD_DIM
    query_ptr = qkv_ptr + sequence_start * 3 * width + head * HEAD_DIM
    out_offset = sequence_start * width + head * HEAD_DIM
    lse_offset = head * num_rows + sequence_start
    query = load_rows(query_ptr, tile_start, length, 3 * width, BLOCK_M, HEAD_DIM, False)
    out = load_rows(out_ptr + out_offset, tile_start, length, width, BLOCK_M, HEAD_DIM, False)
    d_out = load_rows(d_out_ptr + out_offset, tile_start, length, width, BLOCK_M, HEAD_DIM, False)
    row = tile_start + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + lse_offset + row, mask=row < length, other=0.0)
    # sum(P * dP) over the keys equals sum(out * d_out) over the head, which needs no pass over the keys.
    delta = tl.sum(out.to(SUM_DTYPE) * d_out.to(SUM_DTYPE), 1)
    tl.store(delta_ptr + lse_offset + row, delta, mask=row < length)
    d_query = tl.zeros((BLOCK_M, HEAD_DIM), SUM_DTYPE)
    for key_start in range(0, length, BLOCK_N):
        key = load_rows(query_ptr + width, key_start, length, 3 * width, BLOCK_N, HEAD_DIM, False)
        value = load_rows(query_ptr + 2 * width, key_start, length, 3 * width, BLOCK_N, HEAD_DIM, False)
        score = tl.dot(query, tl.trans(key), out_dtype=SUM_DTYPE, input_precision=INPUT_PRECISION)
        weight = tl.exp2(score * (SCALE * LOG2_E) - lse[:, None])
        is_key = key_start + tl.arange(0, BLOCK_N) < length
        weight = tl.where(is_key[None, :], weight, 0.0)
        d_weight = tl.dot(d_out, tl.trans(value), out_dtype=SUM_DTYPE, input_precision=INPUT_PRECISION)
        d_score = (weight * (d_weight - delta[:, None])).to(key.dtype)
        d_query = tl.dot(d_score, key, d_query, out_dtype=SUM_DTYPE, input_precision=INPUT_PRECISION)
    d_query_ptr = d_qkv_ptr + sequence_start * 3 * width + head * HEAD_DIM
    store_rows(d_query_ptr, d_query * SCALE, tile_start, length, 3 * width)


@triton.jit(do_not_specialize=["longest", "num_heads", "num_rows"])
def _d_key_kernel(
    qkv_ptr,  # (rows, 3, H, d)
    offsets_ptr,  # (B + 1,) int32, or None
    d_out_ptr,  # (rows, H, d)
    d_qkv_ptr,  # (rows, 3, H, d): dK and dV are written
    lse_ptr,  # (H, rows): log2 of the softmax's denominator
    delta_ptr,  # (H, rows): sum(out * d_out) of each row, from `_d_query_kernel`
    longest, num_heads, num_rows,
    HEAD_DIM: tl.constexpr, LIMITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr, SUM_DTYPE: tl.constexpr, INPUT_PRECISION: tl.constexpr,
):  # fmt: skip
    head, sequence_start, length, tile_start = _locate_tile(offsets_ptr, longest, num_heads, LIMITS, BLOCK_M)
    if tile_start >= length:
        return
    width = num_heads * HEAD_DIM
    query_ptr = qkv_ptr + sequence_start * 3 * width + head * HEAD_DIM
    d_query_ptr = d_qkv_ptr + sequence_start * 3 * width + head * HEAD_DIM
    d_out_base_ptr = d_out_ptr + sequence_start * width + head * HEAD_DIM
    lse_offset = head * num_rows + sequence_start
    key = load_rows(query_ptr + width, tile_start, length, 3 * width, BLOCK_M, HEAD_DIM, False)
    value = load_rows(query_ptr + 2 * width, tile_start, length, 3 * width, BLOCK_M, HEAD_DIM, False)
    is_key = tile_start + tl.arange(0, BLOCK_M) < length
    d_key = tl.zeros((BLOCK_M, HEAD_DIM), SUM_DTYPE)
    d_value = tl.zeros((BLOCK_M, HEAD_DIM), SUM_DTYPE)
    # Scores are transposed, (keys, queries), so that both sums over queries are products without a transposition.
    # Queries from `length` on need no mask: their d_out and delta are zero, and so is all that they add.
    for query_start in range(0, length, BLOCK_N):
        query = load_rows(query_ptr, query_start, length, 3 * width, BLOCK_N, HEAD_DIM, False)
        d_out = load_rows(d_out_base_ptr, query_start, length, width, BLOCK_N, HEAD_DIM, False)
        row = query_start + tl.arange(0, BLOCK_N)
        lse = tl.load(lse_ptr + lse_offset + row, mask=row < length, other=0.0)
        delta = tl.load(delta_ptr + lse_offset + row, mask=row < length, other=0.0)
        score = tl.dot(key, tl.trans(query), out_dtype=SUM_DTYPE, input_precision=INPUT_PRECISION)
        weight = tl.exp2(score * (SCALE * LOG2_E) - lse[None, :])
        weight = tl.where(is_key[:, None], weight, 0.0)
        d_value = tl.dot(weight.to(query.dtype), d_out, d_value, out_dtype=SUM_DTYPE, input_precision=INPUT_PRECISION)
        d_weight = tl.dot(value, tl.trans(d_out), out_dtype=SUM_DTYPE, input_precision=INPUT_PRECISION)
        d_score = (weight * (d_weight - delta[None, :])).to(query.dtype)
        d_key = tl.dot(d_score, query, d_key, out_dtype=SUM_DTYPE, input_precision=INPUT_PRECISION)
    store_rows(d_query_ptr + width, d_key * SCALE, tile_start, length, 3 * width)
    store_rows(d_query_ptr + 2 * width, d_value, tile_start, length, 3 * width)


def choose_config(architecture: int, packed: PackedQKV) -> FlashConfig:
    """Return the tile sizes for an architecture and the dtype of `packed`."""
    if packed.fits_half_precision_tiles:
        return _HALF_PRECISION_CONFIGS.get(architecture, _HALF_PRECISION_CONFIGS[0])
    return _FLOAT32_CONFIG


def forward_launch(config: FlashConfig, packed: PackedQKV, limit: int, *, out: Tensor, lse: Tensor) -> Launch:
    """Return the launch that fills `out` and `lse` for all sequences longer than `limit`."""
    return _launch(_forward_kernel, config.forward, packed, limit, {"out_ptr": out, "lse_ptr": lse})


def backward_launches(
    config: FlashConfig, packed: PackedQKV, limit: int, *, out: Tensor, lse: Tensor, d_out: Tensor, d_qkv: Tensor
) -> list[Launch]:
    """Return the launches that fill `d_qkv` for all sequences longer than `limit`, in the order they must run in."""
    tensors = {"d_out_ptr": d_out, "d_qkv_ptr": d_qkv, "lse_ptr": lse, "delta_ptr": torch.empty_like(lse)}
    return [
        _launch(_d_query_kernel, config.d_query, packed, limit, tensors | {"out_ptr": out}),
        _launch(_d_key_kernel, config.d_key, packed, limit, tensors),
    ]


def _launch(kernel, tiles: TileConfig, packed: PackedQKV, limit: int, tensors: dict[str, Tensor]) -> Launch:
    num_tiles = triton.cdiv(packed.longest, tiles.block_m)
    constants = {
        # The lower limit, exclusive. In the kernels of `short`, upper limits follow it in the same tuple.
        "LIMITS": (limit,),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        # Three tf32 products keep 22 of float32's 24 bits, nearly the precision of torch's default. Triton ignores the
        # setting for other dtypes.
        "INPUT_PRECISION": "tf32x3" if packed.qkv.dtype == torch.float32 else "tf32",
    }
    grid = (packed.num_sequences * packed.num_heads * num_tiles,)
    return Launch(
        kernel, grid, packed.arguments | tensors, packed.constants | constants, tiles.num_warps, tiles.num_stages
    )
