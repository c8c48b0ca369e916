"""Mixtures of sources: which source fills each slot, and with which sample, as a pure function of (seed, step, slot).

How many of the first N samples of a run come from each source follows from N alone: its share of them, rounded up or
down by a random offset. A batch therefore holds each source's share to within a few samples, and resuming needs no
counters. Which slots of the batch a source fills is random.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import lcm

import numpy as np
from jaxtyping import Int64

from iwm_fast.pipelines.counter_rng import random_bits
from iwm_fast.pipelines.sampling.shuffle import SampleOrder


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """One of the sources of a mixture."""

    name: str
    weight: float
    """Share of the slots that it fills, relative to the weights of the other sources."""
    order: SampleOrder
    """Its own endless order, with epochs of its own."""
    first_sample: int
    """Number of its first sample in the data set."""


class MixedOrder:
    """The endless order of the samples of several sources, each of which fills its share of every batch."""

    def __init__(self, sources: Sequence[Source], seed: int) -> None:
        """Set the sources and the seed."""
        self.sources: Sequence[Source] = sources
        self._seed = seed
        # As integers, so that counts are exact however long a run is. Weights count as they were written: 0.1 is
        # a tenth, which no float is.
        weights = [Fraction(str(source.weight)) for source in sources]
        scale = lcm(*(weight.denominator for weight in weights))
        self._weights = [int(weight * scale) for weight in weights]
        self._rests = [sum(self._weights[number:]) for number in range(len(sources))]
        # Without offsets, the last source would get every share that is rounded.
        bits = random_bits(seed, "offsets of sources", np.arange(len(sources))).tolist()
        self._offsets = [offset * rest >> 64 for offset, rest in zip(bits, self._rests, strict=True)]
        # All micro-batches of a step need its batch. Two are enough, since a plan is read in order.
        self._batch = lru_cache(maxsize=2)(self._draw_batch)

    def counts(self, position: int) -> list[int]:
        """Return how many samples each source has given to the first `position` positions of the stream."""
        counts = []
        # Each source takes its share of what the sources before it leave. A share never shrinks as the rest grows, and
        # the last one takes the rest.
        for weight, rest, offset in zip(self._weights, self._rests, self._offsets, strict=True):
            count = (position * weight + offset) // rest
            counts.append(count)
            position -= count
        return counts

    def epochs(self, position: int) -> dict[str, float]:
        """Return how often each source has been seen, by name, after `position` positions of the stream."""
        pairs = zip(self.sources, self.counts(position), strict=True)
        return {source.name: count / source.order.num_samples for source, count in pairs}

    def batch_samples(
        self, slots: Int64[np.ndarray, "slots"], *, step: int, position: int, size: int
    ) -> Int64[np.ndarray, "slots"]:
        """Return the samples in these slots of a step's batch.

        Args:
            slots: positions in the batch.
            step: optimiser step.
            position: position of the batch's first sample in the stream.
            size: number of samples in the batch.
        """
        return self._batch(step, position, size)[slots]

    def _draw_batch(self, step: int, position: int, size: int) -> Int64[np.ndarray, "size"]:
        begins, ends = np.array(self.counts(position)), np.array(self.counts(position + size))
        # Sorting by random bits permutes the slots, of which each source takes its number.
        order = np.argsort(random_bits(self._seed, "source", step, np.arange(size)), kind="stable")
        parts = np.split(order, np.cumsum(ends - begins)[:-1])
        samples = np.empty(size, np.int64)
        for source, begin, slots in zip(self.sources, begins.tolist(), parts, strict=True):
            positions = begin + np.arange(len(slots))
            samples[np.sort(slots)] = source.first_sample + source.order.samples_at(positions)
        return samples
