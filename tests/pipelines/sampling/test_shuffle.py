"""Properties of the shuffled order of samples."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from iwm_fast.pipelines.sampling.shuffle import SampleOrder

sizes = st.lists(st.integers(1, 9), min_size=1, max_size=12)
seeds = st.integers(0, 2**32)
windows = st.integers(1, 14)
# Without a deadline, since a busy machine must not fail these tests.
law = settings(deadline=None)


@law
@given(sizes, seeds, windows, st.integers(0, 1000))
def test_each_sample_comes_once_per_epoch(shard_sizes, seed, window, epoch):
    count = sum(shard_sizes)
    order = SampleOrder(shard_sizes, seed, window)
    samples = order.samples_at(np.arange(epoch * count, (epoch + 1) * count))
    assert sorted(samples.tolist()) == list(range(count)) and order.num_samples == count


@law
@given(sizes, seeds, windows, st.lists(st.integers(0, 10**6), min_size=1, max_size=40))
def test_order_is_a_pure_function_of_seed_and_position(shard_sizes, seed, window, positions):
    positions = np.array(positions)
    together = SampleOrder(shard_sizes, seed, window).samples_at(positions)
    order = SampleOrder(shard_sizes, seed, window)
    one_by_one = [int(order.samples_at(positions[[index]])[0]) for index in reversed(range(len(positions)))]
    assert together.tolist() == one_by_one[::-1]


@law
@given(seeds, windows, st.integers(1, 4))
def test_ranks_together_read_the_samples_of_a_single_rank(seed, window, world_size):
    order = SampleOrder([5, 7, 3, 8], seed, window)
    single_rank = order.samples_at(np.arange(0, 48))
    by_rank = [
        SampleOrder([5, 7, 3, 8], seed, window).samples_at(np.arange(rank, 48, world_size))
        for rank in range(world_size)
    ]
    for rank, samples in enumerate(by_rank):
        assert samples.tolist() == single_rank[rank::world_size].tolist()


@law
@given(seeds)
def test_epochs_differ_and_seeds_differ(seed):
    def first_two_epochs(seed: int) -> tuple[list[int], list[int]]:
        samples = SampleOrder([20] * 10, seed, 3).samples_at(np.arange(400)).tolist()
        return samples[:200], samples[200:]

    first, second = first_two_epochs(seed)
    assert first != second
    assert first != first_two_epochs(seed + 1)[0]


@law
@given(sizes, seeds, windows)
def test_samples_of_a_window_come_from_at_most_as_many_shards_as_it_has(shard_sizes, seed, window):
    count = sum(shard_sizes)
    locate_one = np.repeat(np.arange(len(shard_sizes)), shard_sizes)
    visited = locate_one[SampleOrder(shard_sizes, seed, window).samples_at(np.arange(count))]
    # A shard is in use from its first to its last sample. A window ends where no shard is in use.
    begin = 0
    while begin < count:
        shards, end = {int(visited[begin])}, begin + 1
        while end - begin < sum(shard_sizes[shard] for shard in shards):
            shards.add(int(visited[end]))
            end += 1
        assert len(shards) <= window
        begin = end


def test_a_window_mixes_its_shards_and_their_samples():
    samples = SampleOrder([100] * 8, 0, 4).samples_at(np.arange(400))
    shards, counts = np.unique(samples // 100, return_counts=True)
    assert counts.tolist() == [100] * 4
    # The first quarter of a window contains about a quarter of the samples of each of its shards.
    early = [int(((samples[:100] // 100) == shard).sum()) for shard in shards]
    assert min(early) > 10 and max(early) < 45
    assert abs(np.corrcoef(np.arange(400), samples % 100)[0, 1]) < 0.15


def test_every_sample_comes_early_and_late_over_many_epochs():
    positions = np.argsort(SampleOrder([4] * 5, 1, 2).samples_at(np.arange(20 * 600)).reshape(600, 20), axis=1)
    # Uniform over 0 .. 19: the mean is 9.5, with a standard error of 5.77 / sqrt(600) = 0.24.
    assert np.abs(positions.mean(axis=0) - 9.5).max() < 1.0


def test_an_epoch_of_imagenet_size_permutes_only_the_windows_that_are_read():
    order = SampleOrder([1000] * 1281, 3, 16)
    samples = order.samples_at(np.arange(10**9, 10**9 + 256))
    assert len(np.unique(samples)) == 256 and len(np.unique(samples // 1000)) <= 16
    assert order._window_permutation.cache_info().currsize == 1


@pytest.mark.parametrize(("shard_sizes", "window"), [([], 1), ([3, 0], 1), ([3], 0)])
def test_empty_shards_and_windows_are_refused(shard_sizes, window):
    with pytest.raises(ValueError, match="must be at least 1"):
        SampleOrder(shard_sizes, 0, window)


def test_negative_positions_are_refused():
    with pytest.raises(ValueError, match=r"positions must be at least 0, got \[-2\]"):
        SampleOrder([3], 0, 1).samples_at(np.array([0, -2]))
