"""Estimate of the GPU memory that a run takes, by ZeRO stage.

With P trained parameters, of which E belong to the encoder, and R ranks, in bytes; all in float32 unless stated:

    weights       4 P; stage 3: 4 P / R
    gradients     4 P; stages 2 and 3: 4 P / R
    Adam          8 P; stages 1 to 3: 8 P / R; stages 1 and 2 take 4 P / R more for a copy of the partition they update
    teacher       4 E, complete on every rank at every stage
    bf16 copies   2 P with optim.precision=bf16: autocast keeps them from forward to backward
    activations   kept by each block for the backward pass, per token: width d, MLP width m, h heads, n in a sequence
                      bf16  20 d + 4 m, and for the attention  fused 4 h, reference 6 d + (6 n + 24) h
                      fp32  32 d + 8 m, and for the attention  fused 4 h, reference 12 d + (4 n + 24) h
                  with activation checkpointing only the block's input, 6 d (bf16) or 8 d (fp32)
    workspace     one more block, of the encoder over all patches (the teacher's, or a recomputed one), and both views
                  of two micro-batches

Activations are multiplied by the tokens of a micro-batch: context for the encoder, context + targets + action tokens
for the predictor. Not included: the CUDA context (about 0.5 GiB), the buffers of DALI (1 to 3 GiB), NCCL and ZeRO, and
fragmentation.
"""

from dataclasses import dataclass

from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.flops import PatchCounts

STAGES = (0, 1, 2, 3)


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

    @property
    def total(self) -> float:
        """Sum over all purposes."""
        networks = self.weights + self.gradients + self.adam + self.teacher + self.bf16_copies
        return networks + self.activations + self.workspace


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """Transformer blocks of one network, and the tokens that pass through them."""

    dim: int
    hidden_dim: int
    num_heads: int
    depth: int
    tokens: float
    """Tokens per image."""


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
    copy = partition if stage in (1, 2) else 0.0
    stacks = _stacks(config, counts)
    activations = sum(
        stack.tokens * stack.depth * _block_bytes(config, stack, checkpoints_activations) for stack in stacks
    )
    teacher_stack = _encoder_stack(config, float(config.grid**2))
    # Two views of two micro-batches, three channels of four bytes.
    views = 2 * 2 * 3 * 4 * config.views.size**2
    workspace = teacher_stack.tokens * _block_bytes(config, teacher_stack, False) + views
    return MemoryEstimate(
        weights=partition if stage == 3 else full,
        gradients=partition if stage >= 2 else full,
        adam=2 * partition + copy if stage >= 1 else 2 * full,
        teacher=4.0 * encoder,
        bf16_copies=2.0 * trained if is_bf16 else 0.0,
        activations=micro_batch_size * activations,
        workspace=micro_batch_size * workspace,
    )


def _encoder_stack(config: RunConfig, tokens: float) -> _Stack:
    encoder = config.model.encoder
    hidden_dim = int(encoder.dim * encoder.mlp_ratio)
    return _Stack(
        dim=encoder.dim, hidden_dim=hidden_dim, num_heads=encoder.num_heads, depth=encoder.depth, tokens=tokens
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
    )
    return _encoder_stack(config, float(counts.context.mean())), predictor_stack


def _block_bytes(config: RunConfig, stack: _Stack, checkpoints_activations: bool) -> float:
    """Return the bytes per token that one block keeps for the backward pass."""
    is_bf16 = config.optim.precision == "bf16"
    if checkpoints_activations:
        return (6.0 if is_bf16 else 8.0) * stack.dim
    linear = 20.0 * stack.dim + 4 * stack.hidden_dim if is_bf16 else 32.0 * stack.dim + 8 * stack.hidden_dim
    if config.runtime.ops == "fused":
        return linear + 4 * stack.num_heads
    # The reference attention keeps queries, keys and values both packed and padded, the softmax weights of each token
    # with every other, and the index of each row.
    padded, softmax = (6, 6) if is_bf16 else (12, 4)
    return linear + padded * stack.dim + (softmax * stack.tokens + 24) * stack.num_heads
