"""Random numbers of a step as a function of the seed and counters alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

from iwm_fast.pipelines.counter_rng import random_bits


@contextmanager
def seeded_rng(*counters: int, seed: int, device: torch.device) -> Iterator[None]:
    """Let torch, numpy and Python draw what follows from the seed and the counters alone, and forget it afterwards.

    Their generators are the process's: other threads must not draw meanwhile, and none of ours ever does.
    """
    (bits,) = (int(value) for value in random_bits(seed, "tuning", *counters))
    kept = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(bits)
        np.random.seed(bits & 0xFFFFFFFF)
        random.seed(bits)
        try:
            yield
        finally:
            random.setstate(kept[0])
            np.random.set_state(kept[1])
