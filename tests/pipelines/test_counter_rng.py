"""Counter-based random numbers: uniform, independent, and the same in any order of calls."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from iwm_fast.pipelines.counter_rng import random_bits, uniforms


def test_the_draw_of_a_slot_does_not_depend_on_other_slots():
    together = uniforms(3, "crop", 7, np.arange(100), 5)
    alone = uniforms(3, "crop", 7, np.array([42]), 5)
    assert (together[42] == alone[0]).all()


def test_uniforms_are_uniform_and_uncorrelated():
    draws = uniforms(0, "crop", 0, np.arange(200_000), 2)
    assert (draws >= 0).all() and (draws < 1).all()
    counts = np.histogram(draws[:, 0], bins=50, range=(0, 1))[0]
    chi_squared = ((counts - 4000) ** 2 / 4000).sum()
    assert chi_squared < 95  # 49 degrees of freedom, p about 1e-4
    neighbours = np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.01 and abs(neighbours) < 0.01


def test_flipping_a_bit_of_a_counter_flips_half_of_the_bits():
    counters = np.arange(4096)
    for bit in (0, 1, 20):
        changed = random_bits(0, "x", counters) ^ random_bits(0, "x", counters ^ (1 << bit))
        share = np.unpackbits(changed.view(np.uint8)).mean()
        assert abs(share - 0.5) < 0.01


@given(st.integers(0, 2**40), st.integers(0, 2**40))
def test_counters_are_not_interchangeable(first: int, second: int):
    assert first == second or random_bits(0, "x", first, second) != random_bits(0, "x", second, first)


def test_seed_purpose_and_step_each_change_the_draw():
    reference = uniforms(0, "crop", 0, np.arange(8), 1)
    for changed in (
        uniforms(1, "crop", 0, np.arange(8), 1),
        uniforms(0, "flip", 0, np.arange(8), 1),
        uniforms(0, "crop", 1, np.arange(8), 1),
    ):
        assert not (reference == changed).any()
