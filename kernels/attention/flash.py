"""Attention over sequences of any length: tiles of queries against tiles of keys with a running softmax.

Takes what `attention_whole` does not: long sequences, and float32, whose tiles are twice as large. One program per
tile of queries (forward, dQ) or of keys (dK and dV), so again nothing is added to memory; the price is that the
backward pass forms the weights twice, seven products instead of five.
"""

# to a type checker the constants of device code are no numbers
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels.attention.packed import LOG2_E, Packed, load_rows, sequence_span, store_rows
from iwm_fast.kernels.launch import Launch


class Tiles(NamedTuple):
    """How one kernel is cut."""

    block_m: int
    """Rows a program owns: queries (forward, dQ), keys (dK and dV)."""
    block_n: int
    """Rows that pass by at a time."""
    num_warps: int
    num_stages: int


class Cut(NamedTuple):
    """How the three kernels are cut."""

    forward: Tiles
    d_query: Tiles
    d_key: Tiles


# half precision, by architecture
NARROW = {
    90: Cut(Tiles(128, 64, 8, 2), Tiles(64, 64, 4, 2), Tiles(64, 64, 4, 2)),
    0: Cut(Tiles(128, 64, 8, 3), Tiles(64, 32, 4, 2), Tiles(64, 32, 4, 2)),
}
# three tf32 products for one of float32 leave little room
WIDE = Cut(Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1), Tiles(16, 32, 4, 1))


@triton.jit
def _place(offsets_ptr, longest, num_heads, LIMITS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Return head, the sequence's first row and length, and the first row of this program's tile."""
    # tiles of one head are neighbours: they read the same keys
    num_tiles = (longest + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0).to(tl.int64)
    unit = program // num_tiles
    first, length = sequence_span(offsets_ptr, unit // num_heads, longest)
    begin = ((program % num_tiles) * BLOCK_M).to(tl.int32)
    if length <= LIMITS[0]:
        # somebody else's: nothing of it is in this tile
        length = length * 0
    return unit % num_heads, first, length, begin


@triton.jit(do_not_specialize=["longest", "num_heads", "num_rows"])
def _forward_kernel(
    qkv_ptr, offsets_ptr, out_ptr, lse_ptr, longest, num_heads, num_rows,
    HEAD_DIM: tl.constexpr, LIMITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr, FLOAT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # qkv_ptr: (rows, 3, H, d); out_ptr: (rows, H, d); lse_ptr: (H, rows), base 2
    head, first, length, begin = _place(offsets_ptr, longest, num_heads, LIMITS, BLOCK_M)
    if begin >= length:
        return
    width = num_heads * HEAD_DIM
    query_ptr = qkv_ptr + first * 3 * width + head * HEAD_DIM
    query = load_rows(query_ptr, begin, length, 3 * width, BLOCK_M, HEAD_DIM, False)
    top = tl.full((BLOCK_M,), float("-inf"), FLOAT)
    total = tl.zeros((BLOCK_M,), FLOAT)
    out = tl.zeros((BLOCK_M, HEAD_DIM), FLOAT)
    for other in range(0, length, BLOCK_N):
        key = load_rows(query_ptr + width, other, length, 3 * width, BLOCK_N, HEAD_DIM, False)
        value = load_rows(query_ptr + 2 * width, other, length, 3 * width, BLOCK_N, HEAD_DIM, False)
        score = tl.dot(query, tl.trans(key), out_dtype=FLOAT, input_precision=PRECISION) * (SCALE * LOG2_E)
        is_key = other + tl.arange(0, BLOCK_N) < length
        score = tl.where(is_key[None, :], score, float("-inf"))
        # never -inf: every tile that passes holds a key
        raised = tl.maximum(top, tl.max(score, 1))
        weight = tl.exp2(score - raised[:, None])
        shrink = tl.exp2(top - raised)
        total = total * shrink + tl.sum(weight, 1)
        out = out * shrink[:, None]
        out = tl.dot(weight.to(value.dtype), value, out, out_dtype=FLOAT, input_precision=PRECISION)
        top = raised
    store_rows(out_ptr + first * width + head * HEAD_DIM, out / total[:, None], begin, length, width)
    row = begin + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + head * num_rows + first + row, top + tl.log2(total), mask=row < length)


@triton.jit(do_not_specialize=["longest", "num_heads", "num_rows"])
def _d_query_kernel(
    qkv_ptr, offsets_ptr, out_ptr, d_out_ptr, d_qkv_ptr, lse_ptr, delta_ptr, longest, num_heads, num_rows,
    HEAD_DIM: tl.constexpr, LIMITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr, FLOAT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # writes dQ, and delta (H, rows) = sum(out * d_out) for the kernel that follows
    head, first, length, begin = _place(offsets_ptr, longest, num_heads, LIMITS, BLOCK_M)
    if begin >= length:
        return
    width = num_heads * HEAD_DIM
    query_ptr = qkv_ptr + first * 3 * width + head * HEAD_DIM
    at_out = first * width + head * HEAD_DIM
    at_lse = head * num_rows + first
    query = load_rows(query_ptr, begin, length, 3 * width, BLOCK_M, HEAD_DIM, False)
    out = load_rows(out_ptr + at_out, begin, length, width, BLOCK_M, HEAD_DIM, False)
    d_out = load_rows(d_out_ptr + at_out, begin, length, width, BLOCK_M, HEAD_DIM, False)
    row = begin + tl.arange(0, BLOCK_M)
    lse = tl.load(lse_ptr + at_lse + row, mask=row < length, other=0.0)
    delta = tl.sum(out.to(FLOAT) * d_out.to(FLOAT), 1)
    tl.store(delta_ptr + at_lse + row, delta, mask=row < length)
    d_query = tl.zeros((BLOCK_M, HEAD_DIM), FLOAT)
    for other in range(0, length, BLOCK_N):
        key = load_rows(query_ptr + width, other, length, 3 * width, BLOCK_N, HEAD_DIM, False)
        value = load_rows(query_ptr + 2 * width, other, length, 3 * width, BLOCK_N, HEAD_DIM, False)
        score = tl.dot(query, tl.trans(key), out_dtype=FLOAT, input_precision=PRECISION)
        weight = tl.exp2(score * (SCALE * LOG2_E) - lse[:, None])
        is_key = other + tl.arange(0, BLOCK_N) < length
        weight = tl.where(is_key[None, :], weight, 0.0)
        d_weight = tl.dot(d_out, tl.trans(value), out_dtype=FLOAT, input_precision=PRECISION)
        d_score = (weight * (d_weight - delta[:, None])).to(key.dtype)
        d_query = tl.dot(d_score, key, d_query, out_dtype=FLOAT, input_precision=PRECISION)
    store_rows(d_qkv_ptr + first * 3 * width + head * HEAD_DIM, d_query * SCALE, begin, length, 3 * width)


@triton.jit(do_not_specialize=["longest", "num_heads", "num_rows"])
def _d_key_kernel(
    qkv_ptr, offsets_ptr, d_out_ptr, d_qkv_ptr, lse_ptr, delta_ptr, longest, num_heads, num_rows,
    HEAD_DIM: tl.constexpr, LIMITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr, FLOAT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # writes dK and dV; transposed as in attention_whole
    head, first, length, begin = _place(offsets_ptr, longest, num_heads, LIMITS, BLOCK_M)
    if begin >= length:
        return
    width = num_heads * HEAD_DIM
    query_ptr = qkv_ptr + first * 3 * width + head * HEAD_DIM
    d_query_ptr = d_qkv_ptr + first * 3 * width + head * HEAD_DIM
    row_ptr = d_out_ptr + first * width + head * HEAD_DIM
    at_lse = head * num_rows + first
    key = load_rows(query_ptr + width, begin, length, 3 * width, BLOCK_M, HEAD_DIM, False)
    value = load_rows(query_ptr + 2 * width, begin, length, 3 * width, BLOCK_M, HEAD_DIM, False)
    is_key = begin + tl.arange(0, BLOCK_M) < length
    d_key = tl.zeros((BLOCK_M, HEAD_DIM), FLOAT)
    d_value = tl.zeros((BLOCK_M, HEAD_DIM), FLOAT)
    for other in range(0, length, BLOCK_N):
        query = load_rows(query_ptr, other, length, 3 * width, BLOCK_N, HEAD_DIM, False)
        d_out = load_rows(row_ptr, other, length, width, BLOCK_N, HEAD_DIM, False)
        row = other + tl.arange(0, BLOCK_N)
        lse = tl.load(lse_ptr + at_lse + row, mask=row < length, other=0.0)
        delta = tl.load(delta_ptr + at_lse + row, mask=row < length, other=0.0)
        score = tl.dot(key, tl.trans(query), out_dtype=FLOAT, input_precision=PRECISION)
        weight = tl.exp2(score * (SCALE * LOG2_E) - lse[None, :])
        weight = tl.where(is_key[:, None], weight, 0.0)
        d_value = tl.dot(weight.to(query.dtype), d_out, d_value, out_dtype=FLOAT, input_precision=PRECISION)
        d_weight = tl.dot(value, tl.trans(d_out), out_dtype=FLOAT, input_precision=PRECISION)
        d_score = (weight * (d_weight - delta[None, :])).to(query.dtype)
        d_key = tl.dot(d_score, query, d_key, out_dtype=FLOAT, input_precision=PRECISION)
    store_rows(d_query_ptr + width, d_key * SCALE, begin, length, 3 * width)
    store_rows(d_query_ptr + 2 * width, d_value, begin, length, 3 * width)


def cut_for(architecture: int, packed: Packed) -> Cut:
    """Return the tiles for an architecture and dtype."""
    return NARROW.get(architecture, NARROW[0]) if packed.is_narrow else WIDE


def forward_launch(cut: Cut, packed: Packed, limit: int, *, out: Tensor, lse: Tensor) -> Launch:
    """Return what fills `out` and `lse` for sequences longer than `limit`."""
    return _launch(_forward_kernel, cut.forward, packed, limit, {"out_ptr": out, "lse_ptr": lse})


def backward_launches(
    cut: Cut, packed: Packed, limit: int, *, out: Tensor, lse: Tensor, d_out: Tensor, d_qkv: Tensor
) -> list[Launch]:
    """Return what fills `d_qkv` for sequences longer than `limit`; the second reads what the first wrote."""
    tensors = {"d_out_ptr": d_out, "d_qkv_ptr": d_qkv, "lse_ptr": lse, "delta_ptr": torch.empty_like(lse)}
    return [
        _launch(_d_query_kernel, cut.d_query, packed, limit, tensors | {"out_ptr": out}),
        _launch(_d_key_kernel, cut.d_key, packed, limit, tensors),
    ]


def _launch(kernel, tiles: Tiles, packed: Packed, limit: int, tensors: dict[str, Tensor]) -> Launch:
    num_tiles = triton.cdiv(packed.longest, tiles.block_m)
    constants = {
        "LIMITS": (limit,),
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        # float32 is multiplied as three tensor-core products: 22 of its 24 bits, as torch's own default nearly
        "PRECISION": "tf32x3" if packed.qkv.dtype == torch.float32 else "tf32",
    }
    grid = (packed.num_sequences * packed.num_heads * num_tiles,)
    return Launch(
        kernel, grid, packed.arguments | tensors, packed.constants | constants, tiles.num_warps, tiles.num_stages
    )
