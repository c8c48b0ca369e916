"""Packed sequences as attention kernels see them: the arguments of a call, finding a sequence, reading its rows."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)


class Packed(NamedTuple):
    """Queries, keys and values of packed sequences."""

    qkv: Tensor
    """(sum N, 3, H, d), contiguous."""
    offsets: Tensor | None
    """(B + 1,) int32; None: every `longest` rows are a sequence."""
    longest: int

    @property
    def is_narrow(self) -> bool:
        """Whether tiles may have the sizes of half precision; on a CPU, interpreted, any dtype has the room."""
        return self.qkv.element_size() == 2 or self.qkv.device.type == "cpu"

    @property
    def num_heads(self) -> int:
        """H."""
        return self.qkv.shape[2]

    @property
    def num_sequences(self) -> int:
        """B."""
        return self.qkv.shape[0] // self.longest if self.offsets is None else self.offsets.numel() - 1

    @property
    def arguments(self) -> dict[str, Any]:
        """What every attention kernel takes and may change from call to call."""
        return {
            "qkv_ptr": self.qkv,
            "offsets_ptr": self.offsets,
            "longest": self.longest,
            "num_heads": self.num_heads,
            "num_rows": self.qkv.shape[0],
        }

    @property
    def constants(self) -> dict[str, Any]:
        """What every attention kernel has compiled in; FLOAT is the type of sums and softmax."""
        head_dim = self.qkv.shape[3]
        is_double = self.qkv.dtype == torch.float64
        return {"HEAD_DIM": head_dim, "SCALE": head_dim**-0.5, "FLOAT": tl.float64 if is_double else tl.float32}


@triton.jit
def sequence_span(offsets_ptr, sequence, longest):
    """Return first row (int64) and length of a sequence; without offsets every `longest` rows are one."""
    if offsets_ptr is None:
        return sequence * longest, longest
    else:
        # offsets_ptr: (B + 1,) int32
        first = tl.load(offsets_ptr + sequence)
        return first.to(tl.int64), tl.load(offsets_ptr + sequence + 1) - first


@triton.jit
def load_rows(row_ptr, first, length, stride, NUM_ROWS: tl.constexpr, DIM: tl.constexpr, IS_FULL: tl.constexpr):
    """Load rows first .. first + NUM_ROWS of a sequence, (NUM_ROWS, DIM); rows from `length` on are zero.

    Those belong to the next sequence: they are not read, since a weight of zero times NaN is NaN. `IS_FULL` promises
    that there are none.
    """
    row = first + tl.arange(0, NUM_ROWS)
    at = row_ptr + row[:, None] * stride + tl.arange(0, DIM)[None, :]
    if IS_FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=(row < length)[:, None], other=0.0)


@triton.jit
def store_rows(row_ptr, tile, first, length, stride):
    """Store a (rows, columns) tile as rows first .. of a sequence, rounded to its dtype; none from `length` on."""
    row = first + tl.arange(0, tile.shape[0])
    at = row_ptr + row[:, None] * stride + tl.arange(0, tile.shape[1])[None, :]
    tl.store(at, tile.to(row_ptr.dtype.element_ty), mask=(row < length)[:, None])
