"""Packed sequences as attention kernels see them: arguments of a launch, and device code to load and store rows."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# The softmax is computed with exp2, which is one instruction on the GPU: exp(x) = exp2(x * log2(e)). The factor is
# folded into the scale of the scores.
LOG2_E = tl.constexpr(1.4426950408889634)


class PackedQKV(NamedTuple):
    """Queries, keys and values of all sequences, stored one sequence after the other."""

    qkv: Tensor
    """(sum N, 3, H, d), contiguous."""
    offsets: Tensor | None
    """(B + 1,) int32, the first row of each sequence; None if every sequence has exactly `longest` rows."""
    longest: int
    """Upper bound of the sequence lengths."""

    @property
    def fits_half_precision_tiles(self) -> bool:
        """Whether kernels can use the tile sizes of half precision.

        On a GPU wider dtypes need more registers and shared memory than there are. The interpreter has no such limit.
        """
        return self.qkv.element_size() == 2 or self.qkv.device.type == "cpu"

    @property
    def num_heads(self) -> int:
        """Number of attention heads, H."""
        return self.qkv.shape[2]

    @property
    def num_sequences(self) -> int:
        """Number of sequences, B."""
        return self.qkv.shape[0] // self.longest if self.offsets is None else self.offsets.numel() - 1

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments common to all attention kernels that may change without a new compilation."""
        return {
            "qkv_ptr": self.qkv,
            "offsets_ptr": self.offsets,
            "longest": self.longest,
            "num_heads": self.num_heads,
            "num_rows": self.qkv.shape[0],
        }

    @property
    def constants(self) -> dict[str, Any]:
        """Compiled-in constants common to all attention kernels; SUM_DTYPE is the dtype of sums and softmax."""
        head_dim = self.qkv.shape[3]
        is_double = self.qkv.dtype == torch.float64
        return {"HEAD_DIM": head_dim, "SCALE": head_dim**-0.5, "SUM_DTYPE": tl.float64 if is_double else tl.float32}


@triton.jit
def sequence_span(offsets_ptr, sequence, longest):
    """Return the first row (int64) and the length of a sequence; without offsets its length is `longest`."""
    if offsets_ptr is None:
        return sequence * longest, longest
    else:
        # offsets_ptr: (B + 1,) int32
        start = tl.load(offsets_ptr + sequence)
        # 64 bits: row * 3 * H * d exceeds 2^31 in large batches.
        return start.to(tl.int64), tl.load(offsets_ptr + sequence + 1) - start


@triton.jit
def load_rows(base_ptr, tile_start, length, stride, NUM_ROWS: tl.constexpr, DIM: tl.constexpr, IS_FULL: tl.constexpr):
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
def store_rows(base_ptr, tile, tile_start, length, stride):
    """Store a (rows, columns) tile at row `tile_start` of a sequence, in its dtype; skip rows from `length` on."""
    # base_ptr: (length, columns) with row stride `stride`, one head of one sequence
    row = tile_start + tl.arange(0, tile.shape[0])
    pointer = base_ptr + row[:, None] * stride + tl.arange(0, tile.shape[1])[None, :]
    tl.store(pointer, tile.to(base_ptr.dtype.element_ty), mask=(row < length)[:, None])
