"""Lower bounds: bytes and operations of each operation, scores computed in tiles, programs per multiprocessor."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.harness.records import PASSES
from iwm_fast.kernels.launch import Launch
from iwm_fast.kernels.offline_compile import MAX_SHARED_BYTES

H200_BYTES_PER_S = 4.3e12
"""Bandwidth of a device-to-device copy measured on an H200, counting bytes read and written."""
H200_FLOPS_PER_S = 790e12
"""Rate of an 8192 x 8192 x 8192 bfloat16 product measured on an H200."""


class Cost(NamedTuple):
    """Minimum traffic of device memory (inputs read once, results written once) and number of operations."""

    bytes: int
    flops: int


def _by_pass(forward: Cost, backward: Cost) -> dict[str, Cost]:
    both = Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return dict(zip(PASSES, (forward, backward, both), strict=True))


def attention_costs(lengths: Sequence[int], num_heads: int, head_dim: int, itemsize: int = 2) -> dict[str, Cost]:
    """Return the costs of attention by pass, from a packed qkv to its packed gradient.

    Bytes are explained in `iwm_fast.kernels.attention.op`. Operations: 4 H d N^2 forward, 10 H d N^2 backward.
    """
    rows, squares = sum(lengths), sum(length**2 for length in lengths)
    unit, logarithms, products = rows * num_heads * head_dim * itemsize, 4 * rows * num_heads, num_heads * head_dim
    forward = Cost(4 * unit + logarithms, 4 * products * squares)
    return _by_pass(forward, Cost(7 * unit + logarithms, 10 * products * squares))


def conditioning_costs(rows: tuple[int, int, int], width: int, *, has_mixer: bool) -> dict[str, Cost]:
    """Return the costs of assembling the predictor's input, with products in bfloat16 and the stream in float32.

    Forward reads the context and writes all packed rows; a mixer also writes its second layer, which backward needs.
    Backward reads the packed gradient and that layer, and writes the context's gradient. A mixer takes two products of
    width x width per target forward and four backward. The first layer's products, once per patch and once per image,
    are too few to count. Weights and indices are not counted. `rows` are context rows, target rows and action tokens.
    """
    context, targets, tokens = rows
    packed, hidden = 4 * width * sum(rows), 2 * width * targets * has_mixer
    product = 2 * targets * width**2 * has_mixer
    # The context is bfloat16. Action tokens and their gradients are float32.
    moved = packed + hidden + 2 * width * context + 4 * width * tokens
    return _by_pass(Cost(moved, 2 * product), Cost(moved, 4 * product))


def norm_costs(rows: int, width: int) -> dict[str, Cost]:
    """Return the costs of residual + LayerNorm with a bfloat16 update and a float32 stream, as its file explains."""
    statistics = 8 * rows
    return _by_pass(Cost(12 * rows * width + statistics, 0), Cost(16 * rows * width + statistics, 0))


def square_tile_waste(length: int, tile: int) -> float:
    """Return scores computed per score needed with square tiles of queries and keys."""
    return (_round_up(length, tile) / length) ** 2


def launch_waste(launches: Sequence[Launch], length: int) -> float:
    """Return scores computed per score needed by the attention launch that handles a length; 0 if none does."""
    return sum(scores_computed(launch, length) for launch in launches) / length**2


def scores_computed(launch: Launch, length: int) -> int:
    """Return the number of scores that a launch computes per sequence and head; 0 if it does not handle the length."""
    constants = launch.constants
    for bucket, split in enumerate(constants["KEY_SPLITS"]):
        if constants["LIMITS"][bucket] < length <= constants["LIMITS"][bucket + 1]:
            return sum(split) * _round_up(length, constants["NUM_QUERIES"])
    return 0


def _round_up(length: int, tile: int) -> int:
    return math.ceil(length / tile) * tile


def programs_per_multiprocessor(registers: int, shared_bytes: int, num_warps: int, arch: int) -> int:
    """Return how many programs run at the same time, limited by registers, shared memory and warps; at most 32.

    A multiprocessor has four quarters, each with 16 K registers and 16 warps; a thread gets registers in units of
    eight. Each program takes 1 KB more shared memory than it requests, and 1 KB exists beyond the most that one may
    request. Source: CUDA C++ Programming Guide, technical specifications; CUDA occupancy calculator.
    """
    by_registers = 16 * 1024 // (32 * _round_up(max(registers, 1), 8))
    by_warps = 4 * min(by_registers, 16) // num_warps
    by_shared = (MAX_SHARED_BYTES[arch] + 1024) // (shared_bytes + 1024)
    return min(by_warps, by_shared, 32)
