"""The random draws of RandAugment, which finetuning applies through DALI (`dali_rand_augment`)."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from iwm_fast.pipelines.config import RandAugmentConfig
from iwm_fast.pipelines.counter_rng import uniforms

NUM_OPERATIONS = 14
"""Number of RandAugment operations; building the graph fails if DALI's suite has another number."""


@dataclass(frozen=True, kw_only=True)
class AugmentDraws:
    """Random parameters of RandAugment for B images, with n operations for each of them."""

    operation: Int32[np.ndarray, "B n"]
    """Number of the operation in DALI's suite, 0 to 13."""
    is_negated: Int32[np.ndarray, "B n"]
    """1 to reverse the operation, for example left instead of right or darker instead of brighter, else 0."""


def draw_augment(config: RandAugmentConfig, seed: int, step: int, slots: np.ndarray) -> AugmentDraws:
    """Draw operations and their directions for these slots of a step."""
    uniform = uniforms(seed, "rand augment", step, slots, 2 * config.num_operations)
    operation, direction = uniform[:, : config.num_operations], uniform[:, config.num_operations :]
    return AugmentDraws(
        operation=(operation * NUM_OPERATIONS).astype(np.int32), is_negated=(direction < 0.5).astype(np.int32)
    )
