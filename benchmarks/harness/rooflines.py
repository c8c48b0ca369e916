"""What no program can beat: bytes and operations of each task, scores in tiles, programs on a multiprocessor."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.harness.records import PASSES
from iwm_fast.kernels.launch import Launch
from iwm_fast.kernels.offline_compile import SHARED_LIMIT

H200_BYTES_PER_S = 4.3e12
"""A device-to-device copy on one H200, read and written."""
H200_FLOPS_PER_S = 790e12
"""An 8192 x 8192 x 8192 bfloat16 product on one H200."""

_REGISTERS_PER_QUARTER = 16 * 1024
_WARPS_PER_QUARTER = 16
_MOST_PROGRAMS = 32


class Cost(NamedTuple):
    """Fewest bytes through device memory and operations: each input read once, each result written once."""

    bytes: int
    flops: int


def _with_both(forward: Cost, backward: Cost) -> dict[str, Cost]:
    both = Cost(forward.bytes + backward.bytes, forward.flops + backward.flops)
    return dict(zip(PASSES, (forward, backward, both), strict=True))


def attention_costs(lengths: Sequence[int], num_heads: int, head_dim: int, itemsize: int = 2) -> dict[str, Cost]:
    """Return attention's costs by pass, from a packed qkv to a packed gradient of it.

    Forward 4u and 4 bytes per row and head for the softmax's logarithm, backward 7u and those (the output need not be
    read), with u the bytes of one (rows, H, d) tensor; 4 H d N^2 operations forward, 10 backward.
    """
    rows, squares = sum(lengths), sum(length**2 for length in lengths)
    unit, logarithms, products = rows * num_heads * head_dim * itemsize, 4 * rows * num_heads, num_heads * head_dim
    forward = Cost(4 * unit + logarithms, 4 * products * squares)
    return _with_both(forward, Cost(7 * unit + logarithms, 10 * products * squares))


def conditioning_costs(rows: tuple[int, int, int], width: int, *, has_mixer: bool) -> dict[str, Cost]:
    """Return costs of assembling the predictor's input, products in bfloat16 and the stream in float32.

    Forward: the context in, every packed row out; with a mixer its second layer out, which the backward pass needs.
    Backward: the packed gradient and that layer in, the context's gradient out. With a mixer two products of width x
    width per target forward, four backward: the first layer's are per patch and per image, too few to count. Weights
    and indices are left out.

    Args:
        rows: context, targets and action tokens.
        width: P.
        has_mixer: whether targets go through the mixer.
    """
    context, targets, tokens = rows
    packed, hidden = 4 * width * sum(rows), 2 * width * targets * has_mixer
    product = 2 * targets * width**2 * has_mixer
    # action tokens are made in float32, and so are their gradients
    others = 2 * width * context + 4 * width * tokens
    moved = packed + hidden + others
    return _with_both(Cost(moved, 2 * product), Cost(moved, 4 * product))


def norm_costs(rows: int, width: int) -> dict[str, Cost]:
    """Return costs of residual + LayerNorm: a bfloat16 update, a float32 stream, 12 bytes per element and 16 back."""
    statistics = 8 * rows
    return _with_both(Cost(12 * rows * width + statistics, 0), Cost(16 * rows * width + statistics, 0))


def library_waste(length: int, tile: int) -> float:
    """Return scores computed per score needed if queries and keys both come in tiles of one size."""
    return (math.ceil(length / tile) * tile / length) ** 2


def launches_waste(launches: Sequence[Launch], length: int) -> float:
    """Return scores computed per score needed by attention launches, on average over those that compute them."""
    computed = [scores for launch in launches if (scores := scores_computed(launch, length))]
    return sum(computed) / len(computed) / length**2


def scores_computed(launch: Launch, length: int) -> int:
    """Return how many scores of one sequence and head a launch computes; 0 if it leaves the length to another."""
    constants = launch.constants
    if "KEY_SPLITS" in constants:
        for rung, split in enumerate(constants["KEY_SPLITS"]):
            if constants["LIMITS"][rung] < length <= constants["LIMITS"][rung + 1]:
                return sum(split) * _up_to(length, constants["NUM_QUERIES"])
        return 0
    if length <= constants["LIMITS"][0]:
        return 0
    return _up_to(length, constants["BLOCK_M"]) * _up_to(length, constants["BLOCK_N"])


def _up_to(length: int, tile: int) -> int:
    return math.ceil(length / tile) * tile


def programs_per_multiprocessor(registers: int, shared_bytes: int, num_warps: int, arch: int) -> int:
    """Return how many programs (of 4, 8, ... warps) run at once, by registers, shared memory and warps.

    64 K registers and 64 warps in four quarters, eight registers of a thread at a time; of shared memory each program
    takes 1 KB more than it asks for, and all have 1 KB more than one may ask for.

    Source: CUDA C++ Programming Guide, technical specifications per compute capability; CUDA occupancy calculator.
    """
    by_registers = _REGISTERS_PER_QUARTER // (32 * _up_to(max(registers, 1), 8))
    by_warps = 4 * min(by_registers, _WARPS_PER_QUARTER) // num_warps
    by_shared = (SHARED_LIMIT[arch] + 1024) // (shared_bytes + 1024)
    return min(by_warps, by_shared, _MOST_PROGRAMS)
