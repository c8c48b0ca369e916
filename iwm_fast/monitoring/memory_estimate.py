"""Estimate of the GPU memory that a run takes, by ZeRO stage.

With P trained parameters, of which E belong to the encoder, and R ranks, in bytes; all in float32 unless stated:

    weights       4 P; stage 3: 4 P / R, and 4 P for the gathered weights, which DeepSpeed keeps from the forward to the
                  backward pass (with its default settings: those of the last 5e8 parameters, if there are more)
    gradients     4 P; stages 2 and 3: 4 P / R
    Adam          8 P; stages 1 to 3: 8 P / R, and 4 P / R for a copy of the partition that they update
    teacher       4 E, complete on every rank at every stage
    bf16 copies   2 P with optim.precision=bf16: autocast keeps them from forward to backward; stage 3: none, because
                  DeepSpeed's linear layers convert their weights again in the backward pass
    activations   kept by each block for the backward pass, per token: width d, MLP width m, h heads, n tokens in a
                  sequence of mean length and l in the longest one
                      bf16  20 d + 4 m, and for the attention 4 h; 2 d more for sequences of equal length with PyTorch's
                            attention, which keeps its output in a layout of its own
                      fp32  32 d + 8 m, and for the attention 4 h n; with sequences of different length, which are
                            padded, 12 d l / n + 4 h l l / n + 24 h
                  with activation checkpointing only the block's input, 6 d (bf16) or 8 d (fp32)
    workspace     one more block, the largest (the teacher's over all patches, or a recomputed one), and both views of
                  two micro-batches
    overhead      the CUDA context, 0.5 GiB, and DALI's buffers, 3 GiB: upper values of what is common, not measured
    margin        5 % of all this

Activations are multiplied by the tokens of a micro-batch: context for the encoder, context + targets + action tokens
for the predictor.

Tests find the activations within 5 % of the tensors that PyTorch saves, which is where the margin comes from. No run on
a GPU has been compared yet. Not included: buffers of NCCL and ZeRO, fragmentation, and at stage 3 with
runtime.ops=reference and bf16 4 d more per token and block, because linear layers then keep their inputs in float32.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
from jaxtyping import Int64

from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.flops import PatchCounts

ZERO_STAGES = (0, 1, 2, 3)
MARGIN = 0.05
"""Share added to the estimate for its uncertainty."""
# In parameters: DeepSpeed's default stage3_max_reuse_distance of 1e9, which counts the way to the last layer and back.
_MAX_GATHERED = 5e8
_CUDA_CONTEXT, _DALI_BUFFERS = 0.5 * 2**30, 3.0 * 2**30


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Estimated bytes on one GPU, by purpose."""

    weights: float
    gradients: float
    adam: float
    teacher: float
    bf16_copies: float
    activations: float
    workspace: float
    overhead: float

    @property
    def margin(self) -> float:
        """Allowance for the uncertainty of the estimate."""
        return MARGIN * sum(getattr(self, item.name) for item in fields(self))

    @property
    def total(self) -> float:
        """Sum over all purposes, and the margin."""
        return self.margin * (1 + 1 / MARGIN)


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """Transformer blocks of one network, and the tokens that pass through them."""

    dim: int
    hidden_dim: int
    num_heads: int
    depth: int
    tokens: float
    """Tokens per image, on average."""
    longest: float
    """Largest number of tokens of an image."""


def estimate_memory(
    config: RunConfig,
    counts: PatchCounts,
    *,
    num_parameters: tuple[int, int],
    world_size: int,
    micro_batch_size: int,
    stage: int,
    checkpoints_activations: bool,
) -> MemoryEstimate:
    """Estimate the memory of one GPU by the formulas in the docstring of this module.

    Args:
        config: settings of the run.
        counts: context and target patches of random masks.
        num_parameters: trained parameters of the encoder and of the predictor.
        world_size: number of ranks.
        micro_batch_size: images per rank and forward pass.
        stage: ZeRO stage, 0 to 3.
        checkpoints_activations: whether activation checkpointing is on.
    """
    encoder, predictor = num_parameters
    trained = encoder + predictor
    is_bf16 = config.optim.precision == "bf16"
    full, partition = 4.0 * trained, 4.0 * trained / world_size
    gathered = 4.0 * min(trained, _MAX_GATHERED)
    stacks = _stacks(config, counts)
    activations = sum(
        stack.tokens * stack.depth * _block_bytes(config, stack, checkpoints_activations) for stack in stacks
    )
    # The teacher encodes all patches, so nothing is padded.
    teacher_stack = _encoder_stack(config, np.array([config.grid**2]))
    block = max(stack.tokens * _block_bytes(config, stack, False) for stack in (*stacks, teacher_stack) if stack.depth)
    # Two views of two micro-batches, three channels of four bytes.
    views = 2 * 2 * 3 * 4 * config.views.size**2
    return MemoryEstimate(
        weights=partition + gathered if stage == 3 else full,
        gradients=partition if stage >= 2 else full,
        adam=3 * partition if stage >= 1 else 2 * full,
        teacher=4.0 * encoder,
        bf16_copies=2.0 * trained if is_bf16 and stage < 3 else 0.0,
        activations=micro_batch_size * activations,
        workspace=micro_batch_size * (block + views),
        overhead=_CUDA_CONTEXT + (_DALI_BUFFERS if config.runtime.loader == "dali" else 0.0),
    )


def largest_micro_batch(estimate: Callable[[int], MemoryEstimate], share: int, memory: float) -> int | None:
    """Return the largest micro-batch size that fits and divides a rank's share of the global batch.

    Args:
        estimate: function from a micro-batch size to the memory it takes.
        share: images per rank and optimiser step.
        memory: bytes of the GPU.

    Returns:
        None if not even one image fits.
    """
    divisors = (size for size in range(share, 0, -1) if share % size == 0)
    return next((size for size in divisors if estimate(size).total <= memory), None)


def _encoder_stack(config: RunConfig, patches: Int64[np.ndarray, "draws"]) -> _Stack:
    encoder = config.model.encoder
    return _Stack(
        dim=encoder.dim,
        hidden_dim=int(encoder.dim * encoder.mlp_ratio),
        num_heads=encoder.num_heads,
        depth=encoder.depth,
        tokens=float(patches.mean()),
        longest=float(patches.max()),
    )


def _stacks(config: RunConfig, counts: PatchCounts) -> tuple[_Stack, _Stack]:
    predictor = config.model.predictor
    num_action_tokens = len(config.views.entries) if predictor.conditioning == "sequence" else 0
    predictor_stack = _Stack(
        dim=predictor.dim,
        hidden_dim=int(predictor.dim * predictor.mlp_ratio),
        num_heads=predictor.num_heads,
        depth=predictor.depth,
        tokens=float((counts.context + counts.target).mean()) + num_action_tokens,
        longest=float((counts.context + counts.target).max()) + num_action_tokens,
    )
    return _encoder_stack(config, counts.context), predictor_stack


def _block_bytes(config: RunConfig, stack: _Stack, checkpoints_activations: bool) -> float:
    """Return the bytes per token that one block keeps for the backward pass."""
    is_bf16 = config.optim.precision == "bf16"
    if checkpoints_activations:
        return (6.0 if is_bf16 else 8.0) * stack.dim
    is_dense = stack.longest == stack.tokens
    if is_bf16:
        output_copy = 2 * stack.dim if is_dense and config.runtime.ops == "reference" else 0
        return 20.0 * stack.dim + 4 * stack.hidden_dim + 4 * stack.num_heads + output_copy
    linear = 32.0 * stack.dim + 8 * stack.hidden_dim
    if is_dense:
        return linear + 4 * stack.longest * stack.num_heads
    # Queries, keys and values also padded, the softmax weights of each token with every other, padding included, and
    # the index of each row.
    padding = stack.longest / stack.tokens
    return linear + padding * (12 * stack.dim + 4 * stack.longest * stack.num_heads) + 24 * stack.num_heads
