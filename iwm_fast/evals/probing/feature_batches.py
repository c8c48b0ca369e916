"""Cached features with their labels, in batches: in order, or mixed without reading single rows all over the disk.

A mixed epoch takes runs of rows that lie together, in random order, and mixes them again inside windows that fit into
memory.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

# a disk or a network folder reads this much nearly as fast as it reads on; of tokens it is 7 images of a ViT-S/16
RUN_BYTES = 2**20
# two of them are in memory; a class has to be spread over many runs of a window if shards are sorted by class
WINDOW_BYTES = 2**29


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

    def in_order(self, batch_size: int) -> Iterator[tuple[Shaped[Tensor, "B *rest"], Int64[Tensor, "B"]]]:
        """Yield each example once; the last batch may be smaller."""
        for first in range(0, len(self), batch_size):
            rows = self.chosen[first : first + batch_size]
            yield self._deliver(self.rows[rows], rows)

    def mixed(
        self, batch_size: int, epochs: int, seed: int
    ) -> Iterator[tuple[Shaped[Tensor, "B *rest"], Int64[Tensor, "B"]]]:
        """Yield each example once in each epoch, in an order of its own; the last batch of an epoch may be smaller."""
        row_bytes = self.rows[:1].nbytes
        run = max(1, self.run_bytes // row_bytes)
        size = max(1, self.window_bytes // row_bytes // batch_size) * batch_size
        order = (
            rows
            for epoch in range(epochs)
            for rows in mixed_windows(self.chosen, run, size, np.random.default_rng((seed, epoch)))
        )
        for rows, content in self._read_ahead(order):
            place = np.searchsorted(np.sort(rows), rows)
            for first in range(0, len(rows), batch_size):
                part = slice(first, first + batch_size)
                yield self._deliver(content[place[part]], rows[part])

    def _read_ahead(
        self, order: Iterable[Int64[np.ndarray, "rows"]]
    ) -> Iterator[tuple[Int64[np.ndarray, "rows"], Shaped[np.ndarray, "rows *rest"]]]:
        """Yield windows of row numbers with the rows in ascending order; the next is read while one is used."""
        with ThreadPoolExecutor(1, thread_name_prefix="features") as reader:
            # ascending, so that runs are read as a whole
            readings = ((rows, reader.submit(lambda chosen: self.rows[np.sort(chosen)], rows)) for rows in order)
            before = next(readings, None)
            for after in chain(readings, [None]):
                if before is not None:
                    yield before[0], before[1].result()
                before = after

    def _deliver(
        self, content: Shaped[np.ndarray, "B *rest"], rows: Int64[np.ndarray, "B"]
    ) -> tuple[Shaped[Tensor, "B *rest"], Int64[Tensor, "B"]]:
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


def split(num_examples: int, holdout: float, seed: int) -> tuple[Int64[np.ndarray, "fit"], Int64[np.ndarray, "held"]]:
    """Return which examples are learnt from, and on which hyperparameters are chosen, both ascending."""
    order = np.random.default_rng(seed).permutation(num_examples).astype(np.int64)
    num_held = round(holdout * num_examples)
    return np.sort(order[num_held:]), np.sort(order[:num_held])
