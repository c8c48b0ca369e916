"""Floating-point operations that training takes per image, and the peak throughput and memory of GPUs.

The count covers the matrix products of the model, with 2 operations per multiply-add. It includes neither padding, nor
the recomputation of activation checkpointing, nor norms and activation functions. A forward pass over n tokens of width
d through L blocks with an MLP of width m takes

    L * (n * (8 d^2 + 4 d m) + 4 n^2 d)

operations and a backward pass twice as many, so training the student costs 3 forward passes. The teacher costs 1.
"""

import re
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from iwm_fast.config.run import EncoderConfig, RunConfig
from iwm_fast.pipelines.sampling.masks import draw_masks

# Enough draws for a mean within 0.3 % with the default masks.
_NUM_DRAWS = 512


@dataclass(frozen=True, kw_only=True)
class PatchCounts:
    """Numbers of context and target patches in a sample of random masks."""

    context: Int64[np.ndarray, "draws"]
    """Visible patches of each mask."""
    target: Int64[np.ndarray, "draws"]
    """Patches to predict of each mask."""


@dataclass(frozen=True, kw_only=True)
class TrainingFlops:
    """Floating-point operations of training on one image."""

    encoder: float
    """Three forward passes over the context of the source view."""
    teacher: float
    """One forward pass over all patches of the target view."""
    predictor: float
    """Three forward passes over context, mask tokens and action tokens; 0 for the identity predictor."""

    @property
    def total(self) -> float:
        """Operations of all networks together."""
        return self.encoder + self.teacher + self.predictor


def patch_counts(config: RunConfig) -> PatchCounts:
    """Draw masks as training does, and count their patches.

    Raises:
        ValueError: if the mask settings leave (almost) no patches for the context.
    """
    masks = draw_masks(config.mask, config.grid, config.seed, 0, np.arange(_NUM_DRAWS))
    return PatchCounts(context=masks.context.sum(axis=1), target=masks.target.sum(axis=1))


def training_flops(config: RunConfig) -> TrainingFlops:
    """Return the operations per image, averaged over random masks.

    Raises:
        ValueError: if the mask settings leave (almost) no patches for the context.
    """
    counts = patch_counts(config)
    return TrainingFlops(
        encoder=3 * encoder_flops(config.model.encoder, counts.context),
        teacher=encoder_flops(config.model.encoder, np.array([config.grid**2])),
        predictor=3 * predictor_flops(config, counts),
    )


def encoder_flops(config: EncoderConfig, patches: Int64[np.ndarray, "draws"]) -> float:
    """Return the operations of one forward pass, averaged over `patches`, the number of patches in each draw."""
    # The patch embedding is a product with the three colour channels of a patch.
    embedding = patches * (2 * 3 * config.patch_size**2 * config.dim)
    return float((embedding + _block_flops(config.dim, config.depth, config.mlp_ratio, patches)).mean())


def predictor_flops(config: RunConfig, counts: PatchCounts) -> float:
    """Return the operations of one forward pass of the predictor, averaged over the draws."""
    predictor, num_entries = config.model.predictor, len(config.views.entries)
    if predictor.depth == 0:
        return 0.0
    dim, tokens = predictor.dim, counts.context + counts.target
    mixing = 0
    if predictor.conditioning == "sequence":
        tokens = tokens + num_entries
    if predictor.conditioning == "feature":
        # Three linear layers mix each mask token with the action.
        mixing = counts.target * (2 * dim * (dim + num_entries) + 4 * dim * dim)
    # Context tokens are projected to the predictor's width, and predicted tokens back to the encoder's.
    projections = (counts.context + counts.target) * (2 * config.model.encoder.dim * dim)
    return float((projections + mixing + _block_flops(dim, predictor.depth, predictor.mlp_ratio, tokens)).mean())


def _block_flops(
    dim: int, depth: int, mlp_ratio: float, tokens: Int64[np.ndarray, "draws"]
) -> Int64[np.ndarray, "draws"]:  # fmt: skip
    hidden_dim = int(dim * mlp_ratio)
    return depth * (tokens * (8 * dim * dim + 4 * dim * hidden_dim) + 4 * tokens * tokens * dim)


class Gpu(NamedTuple):
    """Peak dense operations per second of one GPU, by the precision of matrix products, and its memory."""

    bf16: float
    tf32: float
    fp32: float
    memory_gb: int
    """Memory in 10^9 bytes, the smaller one if a name has two versions."""


# From NVIDIA's data sheets, without sparsity. On GeForce cards, bf16 and tf32 are the values with float32 accumulation.
# The first pattern that matches a device name counts. Cards with slower relatives (4090 D, laptop GPUs) end in "$".
GPUS = {
    r"A100.*80 ?GB": Gpu(312e12, 156e12, 19.5e12, 80),
    r"A100": Gpu(312e12, 156e12, 19.5e12, 40),
    r"GH200": Gpu(989e12, 494e12, 67e12, 96),
    r"H100 PCIe": Gpu(756e12, 378e12, 51e12, 80),
    r"H100 NVL": Gpu(835e12, 417e12, 60e12, 94),
    r"H200 NVL": Gpu(835e12, 417e12, 60e12, 141),
    r"H100": Gpu(989e12, 494e12, 67e12, 80),
    r"H200": Gpu(989e12, 494e12, 67e12, 141),
    r"B200": Gpu(2250e12, 1125e12, 75e12, 180),
    r"L40S": Gpu(362e12, 183e12, 91.6e12, 48),
    r"L40$": Gpu(181e12, 90.5e12, 90.5e12, 48),
    r"L4$": Gpu(121e12, 60e12, 30.3e12, 24),
    r"A10$": Gpu(125e12, 62.5e12, 31.2e12, 24),
    r"A30$": Gpu(165e12, 82e12, 10.3e12, 24),
    r"A40$": Gpu(149.7e12, 74.8e12, 37.4e12, 48),
    r"RTX A6000$": Gpu(154.8e12, 77.4e12, 38.7e12, 48),
    r"RTX 3090$": Gpu(71e12, 35.6e12, 35.6e12, 24),
    r"RTX 4090$": Gpu(165e12, 82.6e12, 82.6e12, 24),
    r"RTX 5090$": Gpu(209.5e12, 104.8e12, 104.8e12, 32),
}
KNOWN_GPUS = "A100, H100, H200, B200, A10, A30, A40, L4, L40, L40S, RTX A6000, RTX 3090, RTX 4090 or RTX 5090"
"""Names that `gpu_peak_flops` and `memory_gb_of` accept, for messages."""


def peak_flops(device: torch.device, precision: str = "bf16") -> tuple[float | None, str]:
    """Return the peak dense operations per second of a device, and its name.

    The peak is None if it is not known: for a CPU, a GPU that is not listed, or a MIG partition. `precision` is
    `optim.precision`.
    """
    if device.type != "cuda":
        return None, "CPU"
    name = torch.cuda.get_device_name(device)
    return gpu_peak_flops(name, precision), name


def gpu_peak_flops(name: str, precision: str = "bf16") -> float | None:
    """Return the peak dense operations per second of the GPU with this name, None if it is not known."""
    gpu = _find_gpu(name)
    if gpu is None or precision == "bf16":
        return gpu and gpu.bf16
    # PyTorch uses TF32 for float32 products only if torch.set_float32_matmul_precision allows it.
    return gpu.fp32 if torch.get_float32_matmul_precision() == "highest" else gpu.tf32


def memory_gb_of(name: str) -> int | None:
    """Return the memory in 10^9 bytes that the data sheet of the GPU with this name gives, None if it is not known."""
    gpu = _find_gpu(name)
    return gpu and gpu.memory_gb


def _find_gpu(name: str) -> Gpu | None:
    if " MIG " in name:
        return None
    return next((gpu for pattern, gpu in GPUS.items() if re.search(pattern, name, re.IGNORECASE)), None)
