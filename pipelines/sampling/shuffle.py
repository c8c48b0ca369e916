"""Which sample stands at a position of the endless stream: a pure function of (seed, position).

Epoch after epoch, every sample comes exactly once. Within an epoch the shards are permuted, neighbours in that order
form windows of a few shards, and the samples of a window are permuted among themselves: the locality of a shuffle
buffer without its state.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int64

from iwm_fast.pipelines.config import check
from iwm_fast.pipelines.counter_rng import random_bits


class SampleOrder:
    """The order of all samples of a set of shards, for ever."""

    def __init__(self, shard_sizes: Sequence[int], seed: int, window: int) -> None:
        """Take the number of samples of each shard, and how many shards are mixed together.

        Raises:
            ValueError: if there is no shard, one is empty, or the window is below 1.
        """
        smallest = min(shard_sizes, default=0)
        check(smallest > 0, "the smallest of shard_sizes", smallest, "be at least 1 sample")
        check(window >= 1, "window", window, "be at least 1 shard")
        self._sizes = np.asarray(shard_sizes, np.int64)
        self._first_sample = np.cumsum(self._sizes) - self._sizes
        self._seed, self._window = seed, window
        self.num_samples = int(self._sizes.sum())
        # a batch touches one or two windows; more are kept so that slow and fast readers can share one order
        self._shards = lru_cache(maxsize=4)(self._permute_shards)
        self._samples = lru_cache(maxsize=8)(self._permute_window)

    def samples_at(self, positions: Int64[np.ndarray, "B"]) -> Int64[np.ndarray, "B"]:
        """Return the sample numbers at these positions, counted from the beginning of training.

        Raises:
            ValueError: if a position is negative.
        """
        check(bool((positions >= 0).all()), "positions", positions[positions < 0][:3].tolist(), "be at least 0")
        samples = np.empty_like(positions)
        epochs, places = np.divmod(positions, self.num_samples)
        for epoch in np.unique(epochs):
            in_epoch = epochs == epoch
            samples[in_epoch] = self._samples_in_epoch(int(epoch), places[in_epoch])
        return samples

    def _samples_in_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        _, window_start = self._shards(epoch)
        windows = np.searchsorted(window_start, places, side="right") - 1
        samples = np.empty_like(places)
        for window in np.unique(windows):
            in_window = windows == window
            samples[in_window] = self._samples(epoch, int(window))[places[in_window] - window_start[window]]
        return samples

    def _permute_shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the epoch's order of shards, and the place in the epoch at which each window begins."""
        order = np.argsort(random_bits(self._seed, "shard order", epoch, np.arange(len(self._sizes))), kind="stable")
        sizes = self._sizes[order]
        return order, (np.cumsum(sizes) - sizes)[:: self._window]

    def _permute_window(self, epoch: int, window: int) -> np.ndarray:
        """Return the sample numbers of one window in their order."""
        order, _ = self._shards(epoch)
        shards = order[window * self._window : (window + 1) * self._window]
        ranges = [self._first_sample[shard] + np.arange(int(self._sizes[shard])) for shard in shards]
        samples = np.concatenate(ranges)
        return samples[np.argsort(random_bits(self._seed, "sample order", epoch, samples), kind="stable")]
