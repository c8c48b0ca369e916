"""How well a sample order mixes shards of sorted samples, and how many files it reads from at the same time.

Both measures of mixing are relative to a full shuffle: the effective number of shards per batch (the exponential of
the entropy), and how often two samples of the same batch are in the same batch again in the next epoch (1 is chance).
"""

from itertools import islice
from typing import NamedTuple

import numpy as np
from scipy.stats import entropy

from benchmarks.harness.photograph_shards import write_numbered_shards
from benchmarks.harness.session import Case, Session, WrongResultError
from benchmarks.pipelines import dali_baselines
from benchmarks.pipelines.baselines import BUFFER, indexed_files, numpy_batches, shuffled_dataset
from benchmarks.pipelines.report import DALI_READER, OURS, SHUFFLING, WEBDATASET_READER
from benchmarks.pipelines.streams import READ_AHEAD, Workload
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards

WINDOWS = (1, 4, 16, 64)
_REPEATS = 4
"""Number of full shuffles whose average is the reference."""


class SortedShards(NamedTuple):
    """Sizes of shards of sorted samples; sample n is in shard n // samples_per_shard."""

    num_shards: int = 64
    samples_per_shard: int = 256
    batch_size: int = 256

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return self.num_shards * self.samples_per_shard


class SampleSequence(NamedTuple):
    """Sample numbers of two epochs in the order of reading, and the cost of that order."""

    epochs: np.ndarray
    """Sample numbers of shape (2, samples)."""
    files: float
    """Average number of files read from for one batch and the batches read ahead of it."""
    buffered: int
    """Size of the shuffle buffer in samples."""


def run(session: Session, workload: Workload, layout: SortedShards | None = None) -> None:
    """Record mixing and cost of our order for several windows, of DALI's reader and of the webdataset library."""
    layout = layout or SortedShards()
    shards = open_shards(write_numbered_shards(workload.folder, layout.num_shards, layout.samples_per_shard))
    windows = sorted({min(window, layout.num_shards) for window in WINDOWS})
    orders = {f"{OURS}, window {window}": our_order(layout, window) for window in windows}
    orders |= {DALI_READER: dali_order(shards, layout), WEBDATASET_READER: webdataset_order(shards)}
    generators = [np.random.default_rng(seed) for seed in range(_REPEATS)]
    full = [np.stack([rng.permutation(layout.num_samples) for _ in range(2)]) for rng in generators]
    full_shards, full_pairs = np.mean([measure_mixing(epochs, layout) for epochs in full], axis=0)
    case = Case(SHUFFLING, {"shards": layout.num_shards, "samples": layout.num_samples, "B": layout.batch_size})
    for name, order in orders.items():
        check(name, order, layout)
        shards, pairs = measure_mixing(order.epochs, layout)
        figures = {
            "effective_shards": round(shards, 2),
            "of_full_shuffle": round(shards / full_shards, 4),
            "pairs_again": round(pairs / full_pairs, 3),
            "files": round(order.files, 1),
            "buffered_samples": order.buffered,
        }
        session.record(case, name, figures=figures)


def check(name: str, order: SampleSequence, layout: SortedShards) -> None:
    """Raise WrongResultError unless both epochs contain every sample exactly once."""
    if not (np.sort(order.epochs, axis=1) == np.arange(layout.num_samples)).all():
        raise WrongResultError(f"{SHUFFLING}: an epoch of {name} does not contain every sample exactly once")


def our_order(layout: SortedShards, window: int) -> SampleSequence:
    """Return the order of a training run with this data.shuffle_window."""
    order = SampleOrder([layout.samples_per_shard] * layout.num_shards, 0, window)
    epochs = order.samples_at(np.arange(2 * layout.num_samples)).reshape(2, -1)
    in_flight = READ_AHEAD * layout.batch_size
    shards = epochs[0, : len(epochs[0]) // in_flight * in_flight].reshape(-1, in_flight) // layout.samples_per_shard
    return SampleSequence(epochs, float(np.mean([len(np.unique(numbers)) for numbers in shards])), 0)


def dali_order(shards: ShardSet, layout: SortedShards) -> SampleSequence:
    """Return the order of DALI's reader, which permutes shards in each epoch and shuffles samples in a buffer."""
    with indexed_files(shards) as files:
        batches = numpy_batches(dali_baselines.read_graph(*files, layout.batch_size))
        numbers = (int(bytes(content)) for batch in batches for content in batch)
        epochs = np.fromiter(islice(numbers, 2 * layout.num_samples), np.int64).reshape(2, -1)
        return SampleSequence(epochs, 1, dali_baselines.BUFFER)


def webdataset_order(shards: ShardSet) -> SampleSequence:
    """Return the order of the webdataset library, which permutes shards in each epoch and shuffles in a buffer."""
    dataset = shuffled_dataset([shard.path for shard in shards.shards])
    epochs = [[int(content) for (content,) in dataset] for _ in range(2)]
    return SampleSequence(np.array(epochs), 1, BUFFER)


def measure_mixing(epochs: np.ndarray, layout: SortedShards) -> tuple[float, float]:
    """Return the effective number of shards per batch, and the share of pairs in the same batch in both epochs."""
    num_batches = layout.num_samples // layout.batch_size
    complete = epochs[:, : num_batches * layout.batch_size]
    shards = complete.reshape(-1, layout.batch_size) // layout.samples_per_shard
    effective = [np.exp(entropy(np.bincount(numbers))) for numbers in shards]
    # Find the batch of each sample in both epochs, then count the samples that have both batches in common.
    batch = np.full((2, layout.num_samples), num_batches)
    for epoch in range(2):
        batch[epoch, complete[epoch]] = np.arange(complete.shape[1]) // layout.batch_size
    together = np.bincount(batch[0] * (num_batches + 1) + batch[1]).astype(float)
    pairs = num_batches * layout.batch_size * (layout.batch_size - 1)
    return float(np.mean(effective)), float((together * (together - 1)).sum() / pairs)
