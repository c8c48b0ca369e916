"""Cached features with their labels, in batches: in order, or mixed without reading single rows all over the disk.

A mixed epoch takes runs of rows that lie together, in random order, and mixes them again inside windows that fit into
memory.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from iwm_fast.evals.probing.extraction import one_ahead

# a disk or a network folder reads this much nearly as fast as it reads on; of tokens it is 7 images of a ViT-S/16
RUN_BYTES = 2**20
# two of them are in memory; a class has to be spread over many runs of a window if shards are sorted by class
WINDOW_BYTES = 2**29

LabelledRows = tuple[Shaped[Tensor, "B *rest"], Int64[Tensor, "B"]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Examples:
    """Some rows of a set of features, and their labels."""

    rows: Shaped[np.ndarray, "images *rest"]
    """Of all images; may be mapped from a file."""
    label: Int64[np.ndarray, "images"]
    chosen: Int64[np.ndarray, "chosen"]
    """Which of them are meant, ascending."""
    device: torch.device | str = "cpu"
    """Where batches are delivered."""
    run_bytes: int = RUN_BYTES
    window_bytes: int = WINDOW_BYTES

    def __len__(self) -> int:
        return len(self.chosen)

    def in_order(self, batch_size: int) -> Iterator[LabelledRows]:
        """Yield each example once; the last batch may be smaller."""
        for first in range(0, len(self), batch_size):
            rows = self.chosen[first : first + batch_size]
            yield self._deliver(self.rows[rows], rows)

    def mixed(self, batch_size: int, epochs: int, seed: int) -> Iterator[LabelledRows]:
        """Yield each example once in each epoch, in an order of its own; the last batch of an epoch may be smaller."""
        row_bytes = self.rows[:1].nbytes
        run = max(1, self.run_bytes // row_bytes)
        size = max(1, self.window_bytes // row_bytes // batch_size) * batch_size
        with ThreadPoolExecutor(1, thread_name_prefix="features") as reader:
            windows = (
                # read in ascending order, so that runs are read as a whole
                (rows, reader.submit(lambda ascending: self.rows[ascending], np.sort(rows)))
                for epoch in range(epochs)
                for rows in mixed_windows(self.chosen, run, size, np.random.default_rng((seed, epoch)))
            )
            # the next window is read while one is used
            for rows, reading in one_ahead(windows):
                content, place = reading.result(), np.searchsorted(np.sort(rows), rows)
                for first in range(0, len(rows), batch_size):
                    part = slice(first, first + batch_size)
                    yield self._deliver(content[place[part]], rows[part])

    def _deliver(self, content: Shaped[np.ndarray, "B *rest"], rows: Int64[np.ndarray, "B"]) -> LabelledRows:
        label = torch.from_numpy(self.label[rows])
        return torch.from_numpy(np.ascontiguousarray(content)).to(self.device), label.to(self.device)


def mixed_windows(
    chosen: Int64[np.ndarray, "chosen"], run: int, size: int, generator: np.random.Generator
) -> Iterator[Int64[np.ndarray, "rows"]]:
    """Yield all rows once in windows of `size`, the last one smaller, each mixed; runs of rows come in random order."""
    runs = [chosen[first : first + run] for first in range(0, len(chosen), run)]
    order = np.concatenate([runs[number] for number in generator.permutation(len(runs))])
    for first in range(0, len(order), size):
        yield generator.permutation(order[first : first + size])
