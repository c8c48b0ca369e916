"""Reproducible random numbers for code that draws from global generators."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from iwm_fast.pipelines.counter_rng import random_bits


@contextmanager
def seeded_rng(*counters: int, seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python from `seed` and `counters`, and restore them on exit.

    Draws inside the context are thus a pure function of these arguments. The generators belong to the process, so no
    other thread may draw at the same time; none of this project's threads does.
    """
    (bits,) = (int(value) for value in random_bits(seed, "tuning", *counters))
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    # fork_rng restores torch's generators; those of numpy and Python are restored below.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(bits)
        # NumPy accepts seeds of 32 bits.
        np.random.seed(bits & 0xFFFFFFFF)
        random.seed(bits)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
