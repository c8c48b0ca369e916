"""The lengths of packed sequences, as the host knows them."""

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor


class Sequences(NamedTuple):
    """Where sequences that are packed one after the other begin and end.

    The bounds are known without waiting for the device. A kernel need not be started for lengths outside them.
    """

    offsets: Tensor | None
    """(B + 1,) int32, the first row of each sequence; None if every sequence has exactly `longest` rows."""
    shortest: int
    """Lower bound of the lengths."""
    longest: int
    """Upper bound of the lengths."""

    @classmethod
    def of_equal_length(cls, length: int) -> "Sequences":
        """Return sequences that all have `length` rows."""
        return cls(None, length, length)

    @classmethod
    def from_lengths(cls, offsets: Tensor, lengths: Collection[int]) -> "Sequences":
        """Return sequences with these offsets (B + 1,); `lengths` holds their B lengths on the host."""
        shortest, longest = min(lengths, default=0), max(lengths, default=0)
        # Without offsets kernels need not look up where a sequence begins, and library functions need not pad.
        is_dense = shortest == longest > 0
        return cls(None if is_dense else offsets, shortest, longest)

    def count(self, num_rows: int) -> int:
        """Return the number of sequences, which have `num_rows` rows in total."""
        return num_rows // self.longest if self.offsets is None else self.offsets.numel() - 1
