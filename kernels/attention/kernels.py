"""Attention kernels: one program per (sequence, head) holds all keys, so no running softmax is needed.

A program reads the keys and values of its head once and keeps them in registers or shared memory while it loops over
tiles of queries. The keys are split into tiles whose sizes are powers of two: 196 keys take 128 + 64 + 16, not 256.
A kernel is compiled with several key splits, one for each bucket of lengths, and a program takes the smallest split
that holds its sequence, so that short sequences of a ragged batch do not cost as much as the longest. A launch skips
sequences that belong to another launch's buckets.

The backward pass works with transposed scores, S^T = K Q^T. Keys are then the rows of every tile: dK and dV accumulate
in registers, and dQ of a query tile is complete when the tile is done. No program adds to another one's result, so
there are no atomics and the gradients have the same bits in every run. sum(P * dP) replaces the equal sum(out * d_out),
so that the output need not be read.
"""

# Type checkers do not know that device code is compiled, where a constexpr parameter is a number.
# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.launch import Launch

# The softmax is computed with exp2, which is one instruction on the GPU: exp(x) = exp2(x * log2(e)). The factor is
# folded into the scale of the scores.
LOG2_E = tl.constexpr(1.4426950408889634)


class LaunchConfig(NamedTuple):
    """Tile sizes and compiler options of one launch, which computes a range of sequence lengths."""

    key_splits: tuple[tuple[int, ...], ...]
    """For each bucket of lengths, shortest first: the sizes of the key tiles. Sequences fill all tiles but the last."""
    num_queries: int
    """Queries per tile."""
    num_warps: int
    num_stages: int
    """Above 1, the next tile of queries is loaded while the current one is processed."""

    @property
    def max_length(self) -> int:
        """Length of the longest sequence that the last bucket holds."""
        return sum(self.key_splits[-1])


class HeadConfigs(NamedTuple):
    """The launches for one head size, shortest lengths first.

    A kernel has the registers of its largest bucket, so buckets that need many more have a separate launch.
    """

    forward: tuple[LaunchConfig, ...]
    backward: tuple[LaunchConfig, ...]

    @property
    def max_length(self) -> int:
        """Length of the longest sequence that both passes can compute."""
        return min(self.forward[-1].max_length, self.backward[-1].max_length)


# All compile without spills; `python -m benchmarks.kernels` prints the registers and shared memory of each.
_UP_TO_128 = ((64,), (128,))
_UP_TO_208 = ((128, 64), (128, 64, 16))
_UP_TO_256 = ((128, 64, 32), (128, 64, 64))
_HOPPER = {
    32: HeadConfigs(
        forward=tuple(LaunchConfig(splits, 64, 4, 1) for splits in (_UP_TO_128, _UP_TO_208, _UP_TO_256)),
        backward=(LaunchConfig(_UP_TO_128, 32, 8, 1), LaunchConfig(((128, 64), (256,)), 32, 8, 2)),
    ),
    64: HeadConfigs(
        forward=(LaunchConfig(_UP_TO_128, 64, 4, 1), LaunchConfig(_UP_TO_208 + _UP_TO_256, 64, 4, 1)),
        backward=(
            LaunchConfig(_UP_TO_128, 64, 8, 2),
            LaunchConfig(((128, 64),), 32, 8, 2),
            LaunchConfig(((256,),), 32, 8, 3),
        ),
    ),
}
_OTHERS = {
    32: HeadConfigs(
        forward=(LaunchConfig(_UP_TO_128, 64, 4, 1), LaunchConfig(_UP_TO_208 + _UP_TO_256[:1], 64, 4, 1)),
        backward=(LaunchConfig(_UP_TO_128, 32, 8, 1), LaunchConfig(((256,),), 32, 8, 1)),
    ),
    64: HeadConfigs(forward=(LaunchConfig(_UP_TO_128, 64, 4, 1),), backward=(LaunchConfig(_UP_TO_128, 32, 8, 2),)),
}


def choose_configs(architecture: int, head_dim: int) -> HeadConfigs:
    """Return the launches for a GPU of compute capability `architecture` / 10."""
    # Hopper and data-centre Blackwell multiply from shared memory. All other GPUs need both operands in registers, so
    # there is room for fewer keys.
    return (_HOPPER if 90 <= architecture < 120 else _OTHERS)[head_dim]


@triton.jit
def _sequence_span(offsets_ptr, sequence, longest):
    """Return the first row (int64) and the length of a sequence; without offsets its length is `longest`."""
    if offsets_ptr is None:
        return sequence * longest, longest
    else:
        # offsets_ptr: (B + 1,) int32
        start = tl.load(offsets_ptr + sequence)
        # 64 bits: row * 3 * H * d exceeds 2^31 in large batches.
        return start.to(tl.int64), tl.load(offsets_ptr + sequence + 1) - start


@triton.jit
def _load_rows(base_ptr, tile_start, length, stride, NUM_ROWS: tl.constexpr, DIM: tl.constexpr, IS_FULL: tl.constexpr):
    """Return the tile (NUM_ROWS, DIM) of a sequence that begins at row `tile_start`; rows from `length` on are zero.

    Those rows belong to the next sequence. They are not read, because a weight of zero times NaN is NaN. `IS_FULL`
    promises that the tile has no such rows and saves the mask.
    """
    # base_ptr: (length, DIM) with row stride `stride`, one head of one sequence
    row = tile_start + tl.arange(0, NUM_ROWS)
    pointer = base_ptr + row[:, None] * stride + tl.arange(0, DIM)[None, :]
    if IS_FULL:
        return tl.load(pointer)
    else:
        return tl.load(pointer, mask=(row < length)[:, None], other=0.0)


@triton.jit
def _store_rows(base_ptr, tile, tile_start, length, stride):
    """Store a (rows, columns) tile at row `tile_start` of a sequence, in its dtype; skip rows from `length` on."""
    # base_ptr: (length, columns) with row stride `stride`, one head of one sequence
    row = tile_start + tl.arange(0, tile.shape[0])
    pointer = base_ptr + row[:, None] * stride + tl.arange(0, tile.shape[1])[None, :]
    tl.store(pointer, tile.to(base_ptr.dtype.element_ty), mask=(row < length)[:, None])


@triton.jit
def _load_keys(base_ptr, length, stride, HEAD_DIM: tl.constexpr, KEY_SPLIT: tl.constexpr):
    """Return all keys (or values) of a head as a tuple of tiles; rows from `length` on are zero."""
    # base_ptr: (length, HEAD_DIM) with row stride `stride`
    # Triton's tuples are immutable, so here and below each iteration of an unrolled loop builds a new one.
    tiles = ()
    key_start = 0
    for i in tl.static_range(len(KEY_SPLIT)):
        tile = _load_rows(base_ptr, key_start, length, stride, KEY_SPLIT[i], HEAD_DIM, i + 1 < len(KEY_SPLIT))
        tiles = tiles + (tile,)
        key_start += KEY_SPLIT[i]
    return tiles


@triton.jit
def _store_keys(base_ptr, tiles, length, stride, KEY_SPLIT: tl.constexpr):
    """Store a tuple of tiles, one after the other, as rows of one head; skip rows from `length` on."""
    # base_ptr: (length, HEAD_DIM) with row stride `stride`
    key_start = 0
    for i in tl.static_range(len(KEY_SPLIT)):
        _store_rows(base_ptr, tiles[i], key_start, length, stride)
        key_start += KEY_SPLIT[i]


@triton.jit
def _attend(
    query_ptr, out_ptr, lse_ptr, length, num_heads, HEAD_DIM: tl.constexpr, KEY_SPLIT: tl.constexpr,
    NUM_QUERIES: tl.constexpr, SCALE: tl.constexpr, SUM_DTYPE: tl.constexpr,
):  # fmt: skip
    """Compute the output and the softmax's log-denominator of one sequence and head."""
    # query_ptr: (length, 3, H, d), at the head's queries; out_ptr: (length, H, d), at the head; lse_ptr: (length,)
    width = num_heads * HEAD_DIM
    keys = _load_keys(query_ptr + width, length, 3 * width, HEAD_DIM, KEY_SPLIT)
    values = _load_keys(query_ptr + 2 * width, length, 3 * width, HEAD_DIM, KEY_SPLIT)
    for query_start in range(0, length, NUM_QUERIES):
        query = _load_rows(query_ptr, query_start, length, 3 * width, NUM_QUERIES, HEAD_DIM, False)
        scores = ()
        row_max = tl.full((NUM_QUERIES,), float("-inf"), SUM_DTYPE)
        key_start = 0
        for i in tl.static_range(len(KEY_SPLIT)):
            score = tl.dot(query, tl.trans(keys[i]), out_dtype=SUM_DTYPE)
            # Only the last tile has rows beyond the sequence: shorter sequences are in a smaller bucket.
            if i == len(KEY_SPLIT) - 1:
                is_key = key_start + tl.arange(0, KEY_SPLIT[i]) < length
                score = tl.where(is_key[None, :], score, float("-inf"))
            key_start += KEY_SPLIT[i]
            scores = scores + (score,)
            row_max = tl.maximum(row_max, tl.max(score, 1))
        row_max = row_max * (SCALE * LOG2_E)
        row_sum = tl.zeros((NUM_QUERIES,), SUM_DTYPE)
        out = tl.zeros((NUM_QUERIES, HEAD_DIM), SUM_DTYPE)
        for i in tl.static_range(len(KEY_SPLIT)):
            weight = tl.exp2(scores[i] * (SCALE * LOG2_E) - row_max[:, None])
            row_sum += tl.sum(weight, 1)
            out = tl.dot(weight.to(query.dtype), values[i], out, out_dtype=SUM_DTYPE)
        _store_rows(out_ptr, out * (1 / row_sum)[:, None], query_start, length, width)
        row = query_start + tl.arange(0, NUM_QUERIES)
        tl.store(lse_ptr + row, row_max + tl.log2(row_sum), mask=row < length)


@triton.jit(do_not_specialize=["longest", "num_heads", "num_rows"])
def _attention_forward(
    qkv_ptr,  # (rows, 3, H, d)
    offsets_ptr,  # (B + 1,) int32, or None
    out_ptr,  # (rows, H, d)
    lse_ptr,  # (H, rows): log2 of the softmax's denominator
    longest, num_heads, num_rows,
    HEAD_DIM: tl.constexpr, KEY_SPLITS: tl.constexpr, LIMITS: tl.constexpr, NUM_QUERIES: tl.constexpr,
    SCALE: tl.constexpr, SUM_DTYPE: tl.constexpr,
):  # fmt: skip
    # Consecutive programs take the heads of one sequence, whose rows lie side by side in memory.
    program = tl.program_id(0).to(tl.int64)
    head = program % num_heads
    sequence_start, length = _sequence_span(offsets_ptr, program // num_heads, longest)
    width = num_heads * HEAD_DIM
    query_ptr = qkv_ptr + sequence_start * 3 * width + head * HEAD_DIM
    out_base_ptr = out_ptr + sequence_start * width + head * HEAD_DIM
    lse_base_ptr = lse_ptr + head * num_rows + sequence_start
    # Bucket i holds lengths above LIMITS[i] and up to LIMITS[i + 1]. A program does nothing if its sequence is in
    # another launch's buckets.
    for i in tl.static_range(len(KEY_SPLITS)):
        if (length > LIMITS[i]) & (length <= LIMITS[i + 1]):
            _attend(
                query_ptr, out_base_ptr, lse_base_ptr, length, num_heads,
                HEAD_DIM, KEY_SPLITS[i], NUM_QUERIES, SCALE, SUM_DTYPE,
            )  # fmt: skip


@triton.jit
def _attend_backward(
    query_ptr, d_out_ptr, d_query_ptr, lse_ptr, length, num_heads, HEAD_DIM: tl.constexpr, KEY_SPLIT: tl.constexpr,
    NUM_QUERIES: tl.constexpr, SCALE: tl.constexpr, SUM_DTYPE: tl.constexpr,
):  # fmt: skip
    """Compute dQ, dK and dV of one sequence and head."""
    # query_ptr, d_query_ptr: (length, 3, H, d), at the head's queries; d_out_ptr: (length, H, d), at the head;
    # lse_ptr: (length,)
    width = num_heads * HEAD_DIM
    keys = _load_keys(query_ptr + width, length, 3 * width, HEAD_DIM, KEY_SPLIT)
    values = _load_keys(query_ptr + 2 * width, length, 3 * width, HEAD_DIM, KEY_SPLIT)
    d_keys = ()
    d_values = ()
    for i in tl.static_range(len(KEY_SPLIT)):
        d_keys = d_keys + (tl.zeros((KEY_SPLIT[i], HEAD_DIM), SUM_DTYPE),)
        d_values = d_values + (tl.zeros((KEY_SPLIT[i], HEAD_DIM), SUM_DTYPE),)
    # Queries from `length` on need no mask: their d_out is zero, and so is all that they add to dK and dV.
    for query_start in range(0, length, NUM_QUERIES):
        query = _load_rows(query_ptr, query_start, length, 3 * width, NUM_QUERIES, HEAD_DIM, False)
        d_out = _load_rows(d_out_ptr, query_start, length, width, NUM_QUERIES, HEAD_DIM, False)
        row = query_start + tl.arange(0, NUM_QUERIES)
        lse = tl.load(lse_ptr + row, mask=row < length, other=0.0)
        weights = ()
        d_weights = ()
        new_d_values = ()
        delta = tl.zeros((NUM_QUERIES,), SUM_DTYPE)
        key_start = 0
        for i in tl.static_range(len(KEY_SPLIT)):
            weight = tl.exp2(tl.dot(keys[i], tl.trans(query), out_dtype=SUM_DTYPE) * (SCALE * LOG2_E) - lse[None, :])
            if i == len(KEY_SPLIT) - 1:
                # Beyond the sequence the score is 0 and exp2(-lse) may be infinite.
                is_key = key_start + tl.arange(0, KEY_SPLIT[i]) < length
                weight = tl.where(is_key[:, None], weight, 0.0)
            key_start += KEY_SPLIT[i]
            d_weight = tl.dot(values[i], tl.trans(d_out), out_dtype=SUM_DTYPE)
            delta += tl.sum(weight * d_weight, 0)
            new_d_values = new_d_values + (tl.dot(weight.to(query.dtype), d_out, d_values[i], out_dtype=SUM_DTYPE),)
            weights = weights + (weight,)
            d_weights = d_weights + (d_weight,)
        d_values = new_d_values
        new_d_keys = ()
        d_query = tl.zeros((NUM_QUERIES, HEAD_DIM), SUM_DTYPE)
        for i in tl.static_range(len(KEY_SPLIT)):
            d_score = (weights[i] * (d_weights[i] - delta[None, :])).to(query.dtype)
            new_d_keys = new_d_keys + (tl.dot(d_score, query, d_keys[i], out_dtype=SUM_DTYPE),)
            d_query = tl.dot(tl.trans(d_score), keys[i], d_query, out_dtype=SUM_DTYPE)
        d_keys = new_d_keys
        _store_rows(d_query_ptr, d_query * SCALE, query_start, length, 3 * width)
    scaled_d_keys = ()
    for i in tl.static_range(len(KEY_SPLIT)):
        scaled_d_keys = scaled_d_keys + (d_keys[i] * SCALE,)
    _store_keys(d_query_ptr + width, scaled_d_keys, length, 3 * width, KEY_SPLIT)
    _store_keys(d_query_ptr + 2 * width, d_values, length, 3 * width, KEY_SPLIT)


@triton.jit(do_not_specialize=["longest", "num_heads", "num_rows"])
def _attention_backward(
    qkv_ptr,  # (rows, 3, H, d)
    offsets_ptr,  # (B + 1,) int32, or None
    d_out_ptr,  # (rows, H, d)
    d_qkv_ptr,  # (rows, 3, H, d)
    lse_ptr,  # (H, rows): log2 of the softmax's denominator
    longest, num_heads, num_rows,
    HEAD_DIM: tl.constexpr, KEY_SPLITS: tl.constexpr, LIMITS: tl.constexpr, NUM_QUERIES: tl.constexpr,
    SCALE: tl.constexpr, SUM_DTYPE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head = program % num_heads
    sequence_start, length = _sequence_span(offsets_ptr, program // num_heads, longest)
    width = num_heads * HEAD_DIM
    query_ptr = qkv_ptr + sequence_start * 3 * width + head * HEAD_DIM
    d_query_ptr = d_qkv_ptr + sequence_start * 3 * width + head * HEAD_DIM
    d_out_base_ptr = d_out_ptr + sequence_start * width + head * HEAD_DIM
    lse_base_ptr = lse_ptr + head * num_rows + sequence_start
    for i in tl.static_range(len(KEY_SPLITS)):
        if (length > LIMITS[i]) & (length <= LIMITS[i + 1]):
            _attend_backward(
                query_ptr, d_out_base_ptr, d_query_ptr, lse_base_ptr, length, num_heads,
                HEAD_DIM, KEY_SPLITS[i], NUM_QUERIES, SCALE, SUM_DTYPE,
            )  # fmt: skip


def forward_launches(architecture: int, qkv: Tensor, sequences: Sequences, out: Tensor, lse: Tensor) -> list[Launch]:
    """Return the launches that fill `out` (sum N, H, d) and `lse` (H, sum N), one per range of lengths that occurs."""
    configs = choose_configs(architecture, qkv.shape[3]).forward
    return build_launches(_attention_forward, configs, qkv, sequences, {"out_ptr": out, "lse_ptr": lse})


def backward_launches(
    architecture: int, qkv: Tensor, sequences: Sequences, d_out: Tensor, d_qkv: Tensor, lse: Tensor
) -> list[Launch]:
    """Return the launches that fill `d_qkv` (sum N, 3, H, d), one per range of lengths that occurs."""
    configs = choose_configs(architecture, qkv.shape[3]).backward
    tensors = {"d_out_ptr": d_out, "d_qkv_ptr": d_qkv, "lse_ptr": lse}
    return build_launches(_attention_backward, configs, qkv, sequences, tensors)


def build_launches(
    kernel: Any, configs: tuple[LaunchConfig, ...], qkv: Tensor, sequences: Sequences, tensors: dict[str, Tensor]
) -> list[Launch]:
    """Return one launch for each configuration whose lengths can occur."""
    num_rows, _, num_heads, head_dim = qkv.shape
    offsets, shortest, longest = sequences
    grid = (sequences.count(num_rows) * num_heads,)
    arguments = tensors | {"qkv_ptr": qkv, "offsets_ptr": offsets, "longest": longest, "num_heads": num_heads,
                           "num_rows": num_rows}  # fmt: skip
    launches = []
    lower_limit = 0
    for config in configs:
        if longest > lower_limit and shortest <= config.max_length:
            constants = _constants(config, lower_limit, head_dim, is_double=qkv.dtype == torch.float64)
            launches.append(Launch(kernel, grid, arguments, constants, config.num_warps, config.num_stages))
        lower_limit = config.max_length
    return launches


@functools.cache
def _constants(config: LaunchConfig, lower_limit: int, head_dim: int, *, is_double: bool) -> dict[str, Any]:
    return {
        "HEAD_DIM": head_dim,
        "KEY_SPLITS": config.key_splits,
        "LIMITS": (lower_limit, *(sum(split) for split in config.key_splits)),
        "NUM_QUERIES": config.num_queries,
        "SCALE": head_dim**-0.5,
        "SUM_DTYPE": tl.float64 if is_double else tl.float32,
    }
