"""The shuffled order of samples: a pure function from (seed, position in the endless stream) to a sample.

Each epoch contains every sample exactly once. Within an epoch the shards are permuted, consecutive shards of that order
form windows, and the samples of a window are permuted. Reads are thus as local as with a shuffle buffer, but there is
no state to save.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from iwm_fast.pipelines.counter_rng import random_bits


class SampleOrder:
    """The endless shuffled order of the samples of a set of shards."""

    def __init__(
        self, shard_sizes: Sequence[int] | Int64[np.ndarray, "shards"], seed: int, window: int, *, name: str = ""
    ) -> None:
        """Set the number of samples of each shard, the seed, and the number of shards in a window.

        Orders with different names are independent of each other.

        Raises:
            ValueError: if there is no shard, a shard is empty, or the window is below 1.
        """
        min_size = min(shard_sizes) if len(shard_sizes) else 0
        if min_size < 1:
            raise ValueError(f"shard_sizes must be at least 1 each and not be empty, got a minimum of {min_size}")
        if window < 1:
            raise ValueError(f"window must be at least 1 shard, got {window}")
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._first_sample = np.cumsum(self._sizes) - self._sizes
        self._seed = seed
        self._suffix = f" of {name}" if name else ""
        self._window = window
        self.num_samples = int(self._sizes.sum())
        # A batch touches one or two windows. The caches hold a few more, since readers that share an order may be at
        # different positions.
        self._shard_permutation = lru_cache(maxsize=4)(self._permute_shards)
        self._window_permutation = lru_cache(maxsize=8)(self._permute_window)

    def samples_at(self, positions: Int64[np.ndarray, "B"]) -> Int64[np.ndarray, "B"]:
        """Return the sample numbers at these positions, counted from the beginning of training.

        Raises:
            ValueError: if a position is negative.
        """
        negative = positions[positions < 0]
        if len(negative):
            raise ValueError(f"positions must be at least 0, got {negative[:3].tolist()}")
        samples = np.empty_like(positions)
        epochs, epoch_positions = np.divmod(positions, self.num_samples)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            samples[in_epoch] = self._samples_in_epoch(int(epoch), epoch_positions[in_epoch])
        return samples

    def batch_samples(
        self, slots: Int64[np.ndarray, "slots"], *, step: int, position: int, size: int
    ) -> Int64[np.ndarray, "slots"]:
        """Return the samples in these slots of the batch whose first sample is at `position` of the stream."""
        return self.samples_at(position + slots)

    def _samples_in_epoch(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """Return the sample numbers at these positions, counted from the beginning of the epoch."""
        _, window_start = self._shard_permutation(epoch)
        windows = np.searchsorted(window_start, positions, side="right") - 1
        samples = np.empty_like(positions)
        for window in np.unique(windows):
            in_window = windows == window
            permutation = self._window_permutation(epoch, int(window))
            samples[in_window] = permutation[positions[in_window] - window_start[window]]
        return samples

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's order of shards, and the position in the epoch at which each window begins."""
        # Sorting by counter-based random keys permutes without a random generator, whose state would have to be saved.
        order = np.argsort(
            random_bits(self._seed, f"shard order{self._suffix}", epoch, np.arange(len(self._sizes))), kind="stable"
        )
        sizes = self._sizes[order]
        return order, (np.cumsum(sizes) - sizes)[:: self._window]

    def _permute_window(self, epoch: int, window: int) -> np.ndarray:
        """Return the sample numbers of a window in shuffled order."""
        order, _ = self._shard_permutation(epoch)
        shards = order[window * self._window : (window + 1) * self._window]
        ranges = [self._first_sample[shard] + np.arange(int(self._sizes[shard])) for shard in shards]
        samples = np.concatenate(ranges)
        return samples[
            np.argsort(random_bits(self._seed, f"sample order{self._suffix}", epoch, samples), kind="stable")
        ]
