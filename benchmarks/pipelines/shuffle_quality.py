"""How well an order mixes samples that lie sorted in their shards, and what that costs in files.

Two figures, each over that of a full shuffle: the effective number of shards in a batch (the exponential of their
entropy), and how often two samples that shared a batch share one again in the next epoch (1: as chance has it).
"""

from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
from scipy.stats import entropy

from benchmarks.harness.photograph_shards import write_numbers
from benchmarks.harness.session import Case, Session, WrongResultError
from benchmarks.pipelines import dali_baselines
from benchmarks.pipelines.baselines import BUFFER, arrays, shuffled, write_indexes
from benchmarks.pipelines.report import DALI_READER, LIBRARY_READER, OURS, SHUFFLING
from benchmarks.pipelines.streams import AHEAD, Workload
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards

WINDOWS = (1, 4, 16, 64)
_REPEATS = 4
"""Full shuffles that are averaged."""


class Set(NamedTuple):
    """Sorted samples: the number of a sample tells its shard."""

    num_shards: int = 64
    samples_per_shard: int = 256
    batch_size: int = 256

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return self.num_shards * self.samples_per_shard


class Order(NamedTuple):
    """Two epochs of sample numbers as they came, and what having them in this order takes."""

    epochs: np.ndarray
    """(2, samples)."""
    files: float
    """Read from for one batch and those read ahead of it, on average."""
    buffered: int
    """Samples that wait in memory to be mixed."""


def run(session: Session, workload: Workload, chosen: Set | None = None) -> None:
    """Write a record for each order."""
    chosen = chosen or Set()
    shards = open_shards(write_numbers(workload.folder, chosen.num_shards, chosen.samples_per_shard))
    windows = sorted({min(window, chosen.num_shards) for window in WINDOWS})
    orders = {f"{OURS}, window {window}": our_order(chosen, window) for window in windows}
    orders |= {DALI_READER: dali_order(shards, chosen), LIBRARY_READER: library_order(shards)}
    generators = [np.random.default_rng(seed) for seed in range(_REPEATS)]
    full = [np.stack([one.permutation(chosen.num_samples) for _ in range(2)]) for one in generators]
    full_shards, full_pairs = np.mean([mixing(epochs, chosen) for epochs in full], axis=0)
    case = Case(SHUFFLING, {"shards": chosen.num_shards, "samples": chosen.num_samples, "B": chosen.batch_size})
    for name, order in orders.items():
        check(name, order, chosen)
        shards, pairs = mixing(order.epochs, chosen)
        figures = {
            "effective_shards": round(shards, 2),
            "of_full_shuffle": round(shards / full_shards, 4),
            "pairs_again": round(pairs / full_pairs, 3),
            "files": round(order.files, 1),
            "buffered_samples": order.buffered,
        }
        session.note(case, name, figures=figures)


def check(name: str, order: Order, chosen: Set) -> None:
    """Check that each epoch holds every sample once.

    Raises:
        WrongResultError: if one does not.
    """
    if not (np.sort(order.epochs, axis=1) == np.arange(chosen.num_samples)).all():
        raise WrongResultError(f"{SHUFFLING}: an epoch of {name} does not hold every sample once")


def our_order(chosen: Set, window: int) -> Order:
    """Return the training order with data.shuffle_window."""
    order = SampleOrder([chosen.samples_per_shard] * chosen.num_shards, 0, window)
    epochs = order.samples_at(np.arange(2 * chosen.num_samples)).reshape(2, -1)
    flight = AHEAD * chosen.batch_size
    shards = epochs[0, : len(epochs[0]) // flight * flight].reshape(-1, flight) // chosen.samples_per_shard
    return Order(epochs, float(np.mean([len(np.unique(one)) for one in shards])), 0)


def dali_order(shards: ShardSet, chosen: Set) -> Order:
    """Return the order of DALI's reader: a buffer of samples, and shards permuted every epoch."""
    with TemporaryDirectory() as folder:
        paths, index_paths = write_indexes(shards, Path(folder))
        graph = dali_baselines.read_graph(paths, index_paths, batch_size=chosen.batch_size, num_threads=1)
        numbers = (int(bytes(content)) for batch in arrays(graph) for content in batch)
        epochs = np.fromiter(islice(numbers, 2 * chosen.num_samples), np.int64).reshape(2, -1)
        return Order(epochs, 1, dali_baselines.BUFFER)


def library_order(shards: ShardSet) -> Order:
    """Return the order of the webdataset library: a buffer of samples, and shards permuted every epoch."""
    data = shuffled([shard.path for shard in shards.shards])
    epochs = [[int(content) for (content,) in data] for _ in range(2)]
    return Order(np.array(epochs), 1, BUFFER)


def mixing(epochs: np.ndarray, chosen: Set) -> tuple[float, float]:
    """Return the effective number of shards in a batch, and the share of pairs that are together in both epochs."""
    num_batches = chosen.num_samples // chosen.batch_size
    whole = epochs[:, : num_batches * chosen.batch_size]
    shards = whole.reshape(-1, chosen.batch_size) // chosen.samples_per_shard
    effective = [np.exp(entropy(np.bincount(one))) for one in shards]
    # each sample's batch in both epochs, then how many samples have the same two
    batch = np.full((2, chosen.num_samples), num_batches)
    for epoch in range(2):
        batch[epoch, whole[epoch]] = np.arange(whole.shape[1]) // chosen.batch_size
    together = np.bincount(batch[0] * (num_batches + 1) + batch[1]).astype(float)
    pairs = num_batches * chosen.batch_size * (chosen.batch_size - 1)
    return float(np.mean(effective)), float((together * (together - 1)).sum() / pairs)
