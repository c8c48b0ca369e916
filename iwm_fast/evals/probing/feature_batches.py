"""Batches of cached features and their labels, in sequence or shuffled, without random reads of single rows.

Shuffling takes runs of consecutive rows in random order, and shuffles them again inside windows that fit into memory.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from iwm_fast.evals.probing.extraction import prefetch_one

# A seek on a disk or a network folder costs about as much as reading this many bytes, which are the tokens of 7 images
# of a ViT-S/16.
RUN_BYTES = 2**20
# Two windows are in memory at a time. If shards are sorted by class, a window must contain runs of many classes.
WINDOW_BYTES = 2**29

FeatureBatch = tuple[Shaped[Tensor, "B *rest"], Int64[Tensor, "B"]]
"""Features and class numbers."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureDataset:
    """A subset of cached features with their labels."""

    features: Shaped[np.ndarray, "images *rest"]
    """Features of all images, which may be mapped from a file."""
    label: Int64[np.ndarray, "images"]
    """Class numbers of all images."""
    indices: Int64[np.ndarray, "subset"]
    """Rows of the subset, ascending."""
    device: torch.device | str = "cpu"
    """Device of the batches."""
    run_bytes: int = RUN_BYTES
    window_bytes: int = WINDOW_BYTES

    def __len__(self) -> int:
        return len(self.indices)

    def sequential_batches(self, batch_size: int) -> Iterator[FeatureBatch]:
        """Yield each example of the subset once, in order; the last batch may be smaller."""
        for first in range(0, len(self), batch_size):
            indices = self.indices[first : first + batch_size]
            yield self._to_batch(self.features[indices], indices)

    def shuffled_batches(self, batch_size: int, epochs: int, seed: int) -> Iterator[FeatureBatch]:
        """Yield each example once per epoch, in a new order; the last batch of an epoch may be smaller."""
        row_bytes = self.features[:1].nbytes
        run_size = max(1, self.run_bytes // row_bytes)
        window_size = max(1, self.window_bytes // row_bytes // batch_size) * batch_size
        with ThreadPoolExecutor(1, thread_name_prefix="features") as reader:
            windows = (
                # Read in ascending order, so that the rows of a run are read together.
                (window, reader.submit(lambda ascending: self.features[ascending], np.sort(window)))
                for epoch in range(epochs)
                for window in shuffle_windows(self.indices, run_size, window_size, np.random.default_rng((seed, epoch)))
            )
            # The next window is read while the current one is used.
            for window, pending in prefetch_one(windows):
                features, position = pending.result(), np.searchsorted(np.sort(window), window)
                for first in range(0, len(window), batch_size):
                    batch = slice(first, first + batch_size)
                    yield self._to_batch(features[position[batch]], window[batch])

    def _to_batch(self, features: Shaped[np.ndarray, "B *rest"], indices: Int64[np.ndarray, "B"]) -> FeatureBatch:
        label = torch.from_numpy(self.label[indices])
        return torch.from_numpy(np.ascontiguousarray(features)).to(self.device), label.to(self.device)


def shuffle_windows(
    indices: Int64[np.ndarray, "subset"], run_size: int, window_size: int, generator: np.random.Generator
) -> Iterator[Int64[np.ndarray, "window"]]:
    """Yield all indices once in shuffled windows of randomly chosen runs; the last window may be smaller."""
    runs = [indices[first : first + run_size] for first in range(0, len(indices), run_size)]
    order = np.concatenate([runs[number] for number in generator.permutation(len(runs))])
    for first in range(0, len(order), window_size):
        yield generator.permutation(order[first : first + window_size])
