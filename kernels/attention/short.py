"""Attention over sequences that fit on a multiprocessor whole: one program per (sequence, head), no running softmax.

Keys and values of a head are read once and stay; queries pass by in tiles. Keys come in pieces, powers of two, so that
196 keys cost 128 + 64 + 16 and not 256. A kernel holds a key_splits of such splits, and each program takes the smallest
one that holds its sequence: short sequences of a ragged batch do not pay for the longest. Sequences that a launch has
no rung for are left to the other launches.

Backward in transposed form, S^T = K Q^T: keys are the rows of every tile, so dK and dV grow in registers and dQ of a
query tile is complete when the tile is: nothing is added to memory, hence no atomics and the same bits every time.
sum(P * dP) takes the place of sum(out * d_out): the output need not be read.

The tables hold what compiles without spills (registers and shared memory: `python -m benchmarks.kernels`).
"""

# to a type checker the constants of device code are no numbers
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels.attention.packed import LOG2_E, Packed, load_rows, sequence_span, store_rows
from iwm_fast.kernels.launch import Launch


class Group(NamedTuple):
    """Lengths that one launch takes care of."""

    key_splits: tuple[tuple[int, ...], ...]
    """Splits of the keys into pieces, shortest first; all pieces but a split's last are full."""
    num_queries: int
    """Queries of a tile."""
    num_warps: int
    num_stages: int
    """Above 1: the next tile of queries is loaded while this one is worked on."""

    @property
    def longest(self) -> int:
        """The longest sequence the last rung holds."""
        return sum(self.key_splits[-1])


_TO_128 = ((64,), (128,))
_TO_208 = ((128, 64), (128, 64, 16))
_TO_256 = ((128, 64, 32), (128, 64, 64))

# by architecture and head size; what registers allow is another group, what they do not is left to attention_tiled
FORWARD = {
    90: {
        32: (Group(_TO_128, 64, 4, 1), Group(_TO_208, 64, 4, 1), Group(_TO_256, 64, 4, 1)),
        64: (Group(_TO_128, 64, 4, 1), Group(_TO_208 + _TO_256, 64, 4, 1)),
    },
    0: {
        32: (Group(_TO_128, 64, 4, 1), Group(_TO_208 + _TO_256[:1], 64, 4, 1)),
        64: (Group(_TO_128, 64, 4, 1), Group(_TO_208 + _TO_256[:1], 64, 4, 1)),
    },
}
BACKWARD = {
    90: {
        32: (Group(_TO_128, 32, 8, 1), Group(((128, 64), (256,)), 32, 8, 2)),
        64: (Group(_TO_128, 64, 8, 2), Group(((128, 64),), 32, 8, 2), Group(((256,),), 32, 8, 3)),
    },
    0: {
        32: (Group(_TO_128, 32, 8, 1),),
        64: (Group(_TO_128, 32, 8, 2),),
    },
}


@triton.jit
def _load_keys(row_ptr, length, stride, HEAD_DIM: tl.constexpr, PIECES: tl.constexpr):
    """Load all keys (or values) of a head as one tile per piece."""
    tiles = ()
    first = 0
    for i in tl.static_range(len(PIECES)):
        tiles = tiles + (load_rows(row_ptr, first, length, stride, PIECES[i], HEAD_DIM, i + 1 < len(PIECES)),)
        first += PIECES[i]
    return tiles


@triton.jit
def _store_keys(row_ptr, tiles, length, stride, PIECES: tl.constexpr):
    """Store what `_load_keys` loads."""
    first = 0
    for i in tl.static_range(len(PIECES)):
        store_rows(row_ptr, tiles[i], first, length, stride)
        first += PIECES[i]


@triton.jit
def _attend(
    query_ptr, out_ptr, lse_ptr, length, num_heads,
    HEAD_DIM: tl.constexpr, PIECES: tl.constexpr, NUM_QUERIES: tl.constexpr, SCALE: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Attend within one sequence and head; pointers are at its first row."""
    width = num_heads * HEAD_DIM
    keys = _load_keys(query_ptr + width, length, 3 * width, HEAD_DIM, PIECES)
    values = _load_keys(query_ptr + 2 * width, length, 3 * width, HEAD_DIM, PIECES)
    for first in range(0, length, NUM_QUERIES):
        query = load_rows(query_ptr, first, length, 3 * width, NUM_QUERIES, HEAD_DIM, False)
        scores = ()
        top = tl.full((NUM_QUERIES,), float("-inf"), FLOAT)
        before = 0
        for i in tl.static_range(len(PIECES)):
            score = tl.dot(query, tl.trans(keys[i]), out_dtype=FLOAT)
            if i == len(PIECES) - 1:
                is_key = before + tl.arange(0, PIECES[i]) < length
                score = tl.where(is_key[None, :], score, float("-inf"))
            before += PIECES[i]
            scores = scores + (score,)
            top = tl.maximum(top, tl.max(score, 1))
        top = top * (SCALE * LOG2_E)
        total = tl.zeros((NUM_QUERIES,), FLOAT)
        out = tl.zeros((NUM_QUERIES, HEAD_DIM), FLOAT)
        for i in tl.static_range(len(PIECES)):
            weight = tl.exp2(scores[i] * (SCALE * LOG2_E) - top[:, None])
            total += tl.sum(weight, 1)
            out = tl.dot(weight.to(query.dtype), values[i], out, out_dtype=FLOAT)
        store_rows(out_ptr, out / total[:, None], first, length, width)
        row = first + tl.arange(0, NUM_QUERIES)
        tl.store(lse_ptr + row, top + tl.log2(total), mask=row < length)


@triton.jit(do_not_specialize=["longest", "num_heads", "num_rows"])
def _forward_kernel(
    qkv_ptr, offsets_ptr, out_ptr, lse_ptr, longest, num_heads, num_rows,
    HEAD_DIM: tl.constexpr, KEY_SPLITS: tl.constexpr, LIMITS: tl.constexpr, NUM_QUERIES: tl.constexpr,
    SCALE: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    # qkv_ptr: (rows, 3, H, d); out_ptr: (rows, H, d); lse_ptr: (H, rows), base 2
    program = tl.program_id(0).to(tl.int64)
    head = program % num_heads
    first, length = sequence_span(offsets_ptr, program // num_heads, longest)
    width = num_heads * HEAD_DIM
    query_ptr = qkv_ptr + first * 3 * width + head * HEAD_DIM
    row_ptr = out_ptr + first * width + head * HEAD_DIM
    row_lse_ptr = lse_ptr + head * num_rows + first
    for i in tl.static_range(len(KEY_SPLITS)):
        if (length > LIMITS[i]) & (length <= LIMITS[i + 1]):
            _attend(
                query_ptr, row_ptr, row_lse_ptr, length, num_heads, HEAD_DIM, KEY_SPLITS[i], NUM_QUERIES, SCALE, FLOAT
            )


@triton.jit
def _attend_backward(
    query_ptr, d_out_ptr, d_query_ptr, lse_ptr, length, num_heads,
    HEAD_DIM: tl.constexpr, PIECES: tl.constexpr, NUM_QUERIES: tl.constexpr, SCALE: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    """Write dQ, dK and dV of one sequence and head."""
    width = num_heads * HEAD_DIM
    keys = _load_keys(query_ptr + width, length, 3 * width, HEAD_DIM, PIECES)
    values = _load_keys(query_ptr + 2 * width, length, 3 * width, HEAD_DIM, PIECES)
    d_keys = ()
    d_values = ()
    for i in tl.static_range(len(PIECES)):
        d_keys = d_keys + (tl.zeros((PIECES[i], HEAD_DIM), FLOAT),)
        d_values = d_values + (tl.zeros((PIECES[i], HEAD_DIM), FLOAT),)
    for first in range(0, length, NUM_QUERIES):
        query = load_rows(query_ptr, first, length, 3 * width, NUM_QUERIES, HEAD_DIM, False)
        d_out = load_rows(d_out_ptr, first, length, width, NUM_QUERIES, HEAD_DIM, False)
        row = first + tl.arange(0, NUM_QUERIES)
        lse = tl.load(lse_ptr + row, mask=row < length, other=0.0)
        weights = ()
        d_weights = ()
        grown = ()
        delta = tl.zeros((NUM_QUERIES,), FLOAT)
        before = 0
        for i in tl.static_range(len(PIECES)):
            weight = tl.exp2(tl.dot(keys[i], tl.trans(query), out_dtype=FLOAT) * (SCALE * LOG2_E) - lse[None, :])
            if i == len(PIECES) - 1:
                # beyond the sequence the score is 0 and exp2(-lse) may be infinite
                is_key = before + tl.arange(0, PIECES[i]) < length
                weight = tl.where(is_key[:, None], weight, 0.0)
            before += PIECES[i]
            d_weight = tl.dot(values[i], tl.trans(d_out), out_dtype=FLOAT)
            delta += tl.sum(weight * d_weight, 0)
            grown = grown + (tl.dot(weight.to(query.dtype), d_out, d_values[i], out_dtype=FLOAT),)
            weights = weights + (weight,)
            d_weights = d_weights + (d_weight,)
        d_values = grown
        grown = ()
        d_query = tl.zeros((NUM_QUERIES, HEAD_DIM), FLOAT)
        for i in tl.static_range(len(PIECES)):
            d_score = (weights[i] * (d_weights[i] - delta[None, :])).to(query.dtype)
            grown = grown + (tl.dot(d_score, query, d_keys[i], out_dtype=FLOAT),)
            d_query = tl.dot(tl.trans(d_score), keys[i], d_query, out_dtype=FLOAT)
        d_keys = grown
        store_rows(d_query_ptr, d_query * SCALE, first, length, 3 * width)
    scaled = ()
    for i in tl.static_range(len(PIECES)):
        scaled = scaled + (d_keys[i] * SCALE,)
    _store_keys(d_query_ptr + width, scaled, length, 3 * width, PIECES)
    _store_keys(d_query_ptr + 2 * width, d_values, length, 3 * width, PIECES)


@triton.jit(do_not_specialize=["longest", "num_heads", "num_rows"])
def _backward_kernel(
    qkv_ptr, offsets_ptr, d_out_ptr, d_qkv_ptr, lse_ptr, longest, num_heads, num_rows,
    HEAD_DIM: tl.constexpr, KEY_SPLITS: tl.constexpr, LIMITS: tl.constexpr, NUM_QUERIES: tl.constexpr,
    SCALE: tl.constexpr, FLOAT: tl.constexpr,
):  # fmt: skip
    # d_out_ptr: (rows, H, d); d_qkv_ptr: (rows, 3, H, d); lse_ptr: (H, rows), base 2
    program = tl.program_id(0).to(tl.int64)
    head = program % num_heads
    first, length = sequence_span(offsets_ptr, program // num_heads, longest)
    width = num_heads * HEAD_DIM
    query_ptr = qkv_ptr + first * 3 * width + head * HEAD_DIM
    d_query_ptr = d_qkv_ptr + first * 3 * width + head * HEAD_DIM
    row_ptr = d_out_ptr + first * width + head * HEAD_DIM
    row_lse_ptr = lse_ptr + head * num_rows + first
    for i in tl.static_range(len(KEY_SPLITS)):
        if (length > LIMITS[i]) & (length <= LIMITS[i + 1]):
            _attend_backward(
                query_ptr, row_ptr, d_query_ptr, row_lse_ptr, length, num_heads,
                HEAD_DIM, KEY_SPLITS[i], NUM_QUERIES, SCALE, FLOAT,
            )  # fmt: skip


def longest_whole(groups: tuple[Group, ...]) -> int:
    """Return the longest sequence that `groups` hold; 0 for no groups."""
    return groups[-1].longest if groups else 0


def forward_launches(groups: tuple[Group, ...], packed: Packed, out: Tensor, lse: Tensor) -> list[Launch]:
    """Return what fills `out` and `lse` for every sequence that `groups` hold."""
    return _launches(_forward_kernel, groups, packed, {"out_ptr": out, "lse_ptr": lse})


def backward_launches(
    groups: tuple[Group, ...], packed: Packed, d_out: Tensor, d_qkv: Tensor, lse: Tensor
) -> list[Launch]:
    """Return what fills `d_qkv` for every sequence that `groups` hold."""
    return _launches(_backward_kernel, groups, packed, {"d_out_ptr": d_out, "d_qkv_ptr": d_qkv, "lse_ptr": lse})


def _launches(kernel: Any, groups: tuple[Group, ...], packed: Packed, tensors: dict[str, Tensor]) -> list[Launch]:
    launches = []
    below = 0
    for group in groups:
        # dense sequences all have the longest's length, packed ones up to it
        is_needed = packed.longest > below and (packed.offsets is not None or packed.longest <= group.longest)
        limits = (below, *(sum(split) for split in group.key_splits))
        constants = {"KEY_SPLITS": group.key_splits, "LIMITS": limits, "NUM_QUERIES": group.num_queries}
        if is_needed:
            grid = (packed.num_sequences * packed.num_heads,)
            arguments, constants = packed.arguments | tensors, packed.constants | constants
            launches.append(Launch(kernel, grid, arguments, constants, group.num_warps, group.num_stages))
        below = group.longest
    return launches
