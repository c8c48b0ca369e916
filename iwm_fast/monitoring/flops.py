"""How much arithmetic a run takes per image, and how much a GPU could do.

Counted are matrix products, a multiply-add as 2, as the model needs them: nothing is added for padding, for what
activation checkpointing computes again, or for norms and activation functions. A forward pass over n tokens of width d
through L blocks with an MLP of width m is

    L * (n * (8 d^2 + 4 d m) + 4 n^2 d)

and a backward pass twice that. The student is trained (3 forward passes), the teacher is not (1).
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from iwm_fast.config.run import EncoderConfig, RunConfig
from iwm_fast.pipelines.sampling.masks import draw_masks

# enough for a mean within 0.3 % with the default masks
_NUM_DRAWS = 512


@dataclass(frozen=True, kw_only=True)
class PatchCounts:
    """How many patches are visible and how many are predicted, for some drawn images."""

    context: Int64[np.ndarray, "draws"]
    target: Int64[np.ndarray, "draws"]


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """Floating-point operations of one training image."""

    encoder: float
    """Three forward passes over the context of the source view."""
    teacher: float
    """One forward pass over all patches of the target view."""
    predictor: float
    """Three forward passes over context, mask tokens and action tokens; 0 for the identity predictor."""

    @property
    def total(self) -> float:
        """All of it."""
        return self.encoder + self.teacher + self.predictor


def patch_counts(config: RunConfig) -> PatchCounts:
    """Draw masks as training does, and count.

    Raises:
        ValueError: if the masks (almost) never leave a patch for the context.
    """
    masks = draw_masks(config.mask, config.grid, config.seed, 0, np.arange(_NUM_DRAWS))
    return PatchCounts(context=masks.context.sum(axis=1), target=masks.target.sum(axis=1))


def training_flops(config: RunConfig) -> TrainingFlops:
    """Return the operations of one image, on average over the run's masks.

    Raises:
        ValueError: if the masks (almost) never leave a patch for the context.
    """
    counts = patch_counts(config)
    return TrainingFlops(
        encoder=3 * encoder_flops(config.model.encoder, counts.context),
        teacher=encoder_flops(config.model.encoder, np.array([config.grid**2])),
        predictor=3 * predictor_flops(config, counts),
    )


def encoder_flops(config: EncoderConfig, patches: Int64[np.ndarray, "draws"]) -> float:
    """Return the operations of one forward pass over so many patches of an image, on average over the draws."""
    embedding = patches * (2 * 3 * config.patch_size**2 * config.dim)
    return float((embedding + _stack(config.dim, config.depth, config.mlp_ratio, patches)).mean())


def predictor_flops(config: RunConfig, counts: PatchCounts) -> float:
    """Return the operations of one forward pass of the predictor, on average over the draws."""
    predictor, num_actions = config.model.predictor, len(config.views.entries)
    if predictor.depth == 0:
        return 0.0
    dim, tokens = predictor.dim, counts.context + counts.target
    mixing = 0
    if predictor.conditioning == "sequence":
        tokens = tokens + num_actions
    if predictor.conditioning == "feature":
        mixing = counts.target * (2 * dim * (dim + num_actions) + 4 * dim * dim)
    ends = (counts.context + counts.target) * (2 * config.model.encoder.dim * dim)
    return float((ends + mixing + _stack(dim, predictor.depth, predictor.mlp_ratio, tokens)).mean())


def _stack(
    dim: int, depth: int, mlp_ratio: float, tokens: Int64[np.ndarray, "draws"]
) -> Int64[np.ndarray, "draws"]:  # fmt: skip
    hidden_dim = int(dim * mlp_ratio)
    return depth * (tokens * (8 * dim * dim + 4 * dim * hidden_dim) + 4 * tokens * tokens * dim)


class Peak(NamedTuple):
    """Dense operations per second of one GPU, by the kind of product."""

    bf16: float
    tf32: float
    fp32: float


# NVIDIA's data sheets, without sparsity; the RTX 4090's bf16 and tf32 are those that sum in float32
PEAKS = {
    r"A100": Peak(312e12, 156e12, 19.5e12),
    r"H100 PCIe": Peak(756e12, 378e12, 51e12),
    r"H[12]00 NVL": Peak(835e12, 417e12, 60e12),
    r"H[12]00": Peak(989e12, 494e12, 67e12),
    r"B200": Peak(2250e12, 1125e12, 75e12),
    r"L40S": Peak(362e12, 183e12, 91.6e12),
    # neither the 4090 D nor the laptop's
    r"RTX 4090$": Peak(165e12, 82.6e12, 82.6e12),
}


def peak_flops(device: torch.device, precision: str = "bf16") -> tuple[float | None, str]:
    """Return what a device could do at most, in dense operations per second, and its name.

    None where that is not known: on a CPU, on a GPU without an entry here, on a share of one (MIG).
    `precision` is `optim.precision`.
    """
    if device.type != "cuda":
        return None, "CPU"
    name = torch.cuda.get_device_name(device)
    return peak_of(name, precision), name


def peak_of(name: str, precision: str = "bf16") -> float | None:
    """Return the peak of a GPU by its name, None if it is not known."""
    found = next((peak for pattern, peak in PEAKS.items() if re.search(pattern, name, re.IGNORECASE)), None)
    if found is None or " MIG " in name:
        return None
    if precision == "bf16":
        return found.bf16
    # torch rounds float32 operands to tf32 only where it was told to
    return found.fp32 if torch.get_float32_matmul_precision() == "highest" else found.tf32
