"""Counter-based random numbers: (seed, purpose, step, slot) always gives the same number, in any order of calls.

There is no generator object and therefore no state to save: ranks, micro-batches and restarts cannot change a draw.
The mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), applied once per counter.
"""

import hashlib

import numpy as np
from jaxtyping import Float64, UInt64

# 2^64 divided by the golden ratio, the odd increment of SplitMix64.
_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def _mix(state: np.ndarray) -> np.ndarray:
    # Shifts and multipliers are Stafford's Mix13, which the paper calls mix64variant13.
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def random_bits(seed: int, purpose: str, *counters: int | np.ndarray) -> UInt64[np.ndarray, "..."]:
    """Return 64 random bits for each combination of the counters, which broadcast against each other.

    `purpose` names the random stream: two purposes give independent bits for the same counters.
    """
    # Python's own hash() differs from process to process; SHA-256 does not.
    stream = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little")
    state = np.full((1,), stream, np.uint64)
    for counter in counters:
        # Arrays, because NumPy warns when a scalar wraps around. Adding before mixing keeps (1, 0) and (0, 1) apart.
        state = _mix(state + _GOLDEN_RATIO * (np.atleast_1d(counter).astype(np.uint64) + np.uint64(1)))
    return state


def uniforms(seed: int, purpose: str, step: int, slots: np.ndarray, count: int) -> Float64[np.ndarray, "B count"]:
    """Return `count` uniform random numbers in [0, 1) for each slot of a step."""
    bits = random_bits(seed, purpose, step, np.asarray(slots)[:, None], np.arange(count)[None, :])
    # The upper 53 bits fill the mantissa of a float64, so the result never rounds up to 1.
    return (bits >> np.uint64(11)) * 2.0**-53
