"""Counter-based random numbers: whoever asks for (seed, purpose, step, slot) gets the same answer, in any order.

There is no generator object and so no state to save: ranks, micro-batches and restarts cannot change what is drawn.
The mixing function is SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014), applied once per counter.
"""

import hashlib

import numpy as np
from jaxtyping import Float64, UInt64

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def random_bits(seed: int, purpose: str, *counters: int | np.ndarray) -> UInt64[np.ndarray, "..."]:
    """Return 64 random bits for each combination of the counters, which broadcast against each other.

    `purpose` names the stream, so that two uses of the same counters are independent.
    """
    stream = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little")
    state = np.full((1,), stream, np.uint64)
    for counter in counters:
        # arrays, since NumPy scalars warn when they wrap around; adding before mixing keeps (1, 0) and (0, 1) apart
        state = _mix(state + _GOLDEN * (np.atleast_1d(counter).astype(np.uint64) + np.uint64(1)))
    return state


def uniforms(seed: int, purpose: str, step: int, slots: np.ndarray, count: int) -> Float64[np.ndarray, "B count"]:
    """Return `count` numbers in [0, 1) for each slot of a step."""
    bits = random_bits(seed, purpose, step, np.asarray(slots)[:, None], np.arange(count)[None, :])
    return (bits >> np.uint64(11)) * 2.0**-53
