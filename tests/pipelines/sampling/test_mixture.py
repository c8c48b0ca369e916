"""Mixtures: every source gives its share of every batch, each sample of it once in each of its epochs."""

import hashlib
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.pipelines.sampling.batch_plan import SampleStream, StreamStart
from iwm_fast.pipelines.sampling.mixture import MixedOrder, Source
from iwm_fast.pipelines.sampling.shuffle import SampleOrder

# Without a deadline, since a busy machine must not fail these tests.
law = settings(deadline=None)
weights = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6)
SIZES = {"a": [5, 7, 3], "b": [4], "c": [9, 2]}


def mixed(shares=(0.7, 0.2, 0.1), seed: int = 3) -> MixedOrder:
    """A mixture of the sources a, b and c, of 15, 4 and 11 samples, or of as many as there are shares."""
    sources, first = [], 0
    for number, weight in enumerate(shares):
        name = "abc"[number] if number < 3 else f"{number}"
        sizes = SIZES.get(name, [1])
        sources.append(
            Source(name=name, weight=weight, order=SampleOrder(sizes, seed, 2, name=name), first_sample=first)
        )
        first += sum(sizes)
    return MixedOrder(sources, seed)


def stream(order, rank: int = 0, world_size: int = 1, micro_batch_size: int = 12, **values) -> SampleStream:
    return SampleStream(
        order=order, global_batch_size=12, micro_batch_size=micro_batch_size, rank=rank, world_size=world_size, **values
    )


def batches(order, steps: int, **values) -> np.ndarray:
    return np.stack([stream(order, **values).samples(step, np.arange(12)) for step in range(steps)])


@law
@given(weights, st.integers(0, 2**32), st.integers(0, 10**18), st.integers(1, 10**4))
def test_counts_are_the_shares_of_all_positions_and_never_shrink(shares, seed, position, size):
    order = mixed(shares, seed)
    before, after = order.counts(position), order.counts(position + size)
    assert sum(before) == position and sum(after) == position + size
    assert all(0 <= first <= last for first, last in zip(before, after, strict=True))
    exact = [Fraction(str(share)) for share in shares]
    # The rounding of a source moves what the sources after it share.
    for number, (count, share) in enumerate(zip(before, exact, strict=True)):
        assert abs(count - share / sum(exact) * position) < number + 1
    assert mixed(shares, seed).counts(0) == [0] * len(shares)


def test_each_source_goes_through_its_own_epochs():
    order = mixed()
    drawn = batches(order, 50).ravel()
    for source, number in zip(order.sources, (15, 4, 11), strict=True):
        own = drawn[(drawn >= source.first_sample) & (drawn < source.first_sample + number)] - source.first_sample
        assert len(own) == order.counts(600)[order.sources.index(source)]
        assert own.tolist() == source.order.samples_at(np.arange(len(own))).tolist()
    assert order.epochs(600) == {name: count / number for name, count, number in
                                 zip("abc", order.counts(600), (15, 4, 11), strict=True)}  # fmt: skip


def test_which_slots_a_source_fills_is_random_and_its_share_of_a_batch_is_not():
    source = np.searchsorted([15, 19], batches(mixed(), 500), side="right")
    numbers = np.stack([(source == number).sum(axis=1) for number in range(3)])
    # 8.4, 2.4 and 1.2 of 12, rounded; the last source takes what the rounding of the others leaves.
    assert set(numbers[0]) == {8, 9} and set(numbers[1]) <= {2, 3} and set(numbers[2]) <= {0, 1, 2}
    assert np.allclose(numbers.mean(axis=1), [8.4, 2.4, 1.2], atol=0.01)
    # Of every slot: the standard error of a share is at most sqrt(0.25 / 500) = 0.022.
    for number, share in enumerate((0.7, 0.2, 0.1)):
        assert np.abs((source == number).mean(axis=0) - share).max() < 0.09
    # Of neighbouring slots and steps.
    is_first = (source == 0).astype(float)
    assert abs(np.corrcoef(is_first[1:].ravel(), is_first[:-1].ravel())[0, 1]) < 0.05


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 12), (2, 6), (3, 2), (4, 1)])
def test_ranks_micro_batches_and_restarts_do_not_change_what_is_drawn(world_size, micro_batch_size):
    expected = batches(mixed(), 20)
    accumulation = 12 // (world_size * micro_batch_size)
    for step in (7, 19, 3):
        drawn = np.full(12, -1)
        for rank in range(world_size):
            # A new object, as after a restart.
            own = stream(mixed(), rank, world_size, micro_batch_size)
            for micro in range(accumulation):
                at_step, slots = own.slots_of(step * accumulation + micro)
                assert at_step == step
                drawn[slots] = own.samples(step, slots)
        assert drawn.tolist() == expected[step].tolist()


def test_a_restarted_epoch_continues_the_sources_from_its_position():
    order, start = mixed(), StreamStart(step=5, position=90)
    drawn = stream(order, start=start).samples(5, np.arange(12))
    source = np.searchsorted([15, 19], drawn, side="right")
    assert [(source == number).sum() for number in range(3)] == np.subtract(
        order.counts(102), order.counts(90)
    ).tolist()


def test_seeds_and_names_give_other_orders():
    first = batches(mixed(), 20)
    assert not np.array_equal(first, batches(mixed(seed=4), 20))
    one, other = (SampleOrder([50], 0, 1, name=name).samples_at(np.arange(50)).tolist() for name in ("a", "b"))
    assert one != other


def test_the_order_of_a_run_without_a_mixture_is_that_of_earlier_versions():
    samples = SampleOrder([50, 20, 31, 44], 17, 3).samples_at(np.arange(1000))
    assert hashlib.sha256(samples.astype("<i8").tobytes()).hexdigest()[:16] == "1ec3035186d6117e"
    assert (
        stream(SampleOrder([50, 20], 1, 1)).samples(4, np.array([3, 1])).tolist()
        == SampleOrder([50, 20], 1, 1).samples_at(np.array([51, 49])).tolist()
    )
