"""About how much of a GPU's memory a run takes, by ZeRO stage.

With P trained parameters, E of them the encoder's, and R ranks, in bytes, everything float32:

    weights       4 P; stage 3: 4 P / R
    gradients     4 P; stages 2 and 3: 4 P / R
    Adam          8 P; stages 1 to 3: 8 P / R; stages 1 and 2 keep 4 P / R more for a copy of the part they update
    teacher       4 E, whole on every rank at every stage
    bf16 copies   2 P with optim.precision=bf16: autocast keeps them from forward to backward
    activations   kept for the backward pass by every block, per token: width d, MLP width m, h heads, n in a sequence
                      bf16  20 d + 4 m, and for the attention  fused 4 h, reference 6 d + (6 n + 24) h
                      fp32  32 d + 8 m, and for the attention  fused 4 h, reference 12 d + (4 n + 24) h
                  with activation checkpointing 6 d (bf16) or 8 d (fp32), the block's input
    at work       one block more, of the encoder over all patches (the teacher's, or one that is computed again), and
                  both views of two micro-batches

times the tokens of a micro-batch: context for the encoder, context + targets + action tokens for the predictor.
Left out: the CUDA context (about 0.5 GiB), DALI's buffers (1 to 3 GiB), NCCL's, fragmentation, buckets of ZeRO.
"""

from dataclasses import dataclass

from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.flops import PatchCounts

STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one GPU."""

    weights: float
    gradients: float
    adam: float
    teacher: float
    bf16_copies: float
    activations: float
    workspace: float

    @property
    def total(self) -> float:
        """All of it."""
        parts = (
            self.weights,
            self.gradients,
            self.adam,
            self.teacher,
            self.bf16_copies,
            self.activations,
            self.workspace,
        )
        return sum(parts)


@dataclass(frozen=True, kw_only=True)
class _Stack:
    """Blocks of one width, and what goes through them."""

    dim: int
    hidden_dim: int
    num_heads: int
    depth: int
    tokens: float
    """Of one image."""


def estimate_memory(
    config: RunConfig,
    counts: PatchCounts,
    *,
    num_parameters: tuple[int, int],
    world_size: int,
    micro_batch_size: int,
    stage: int,
    checkpoints_activations: bool,
) -> Memory:
    """Estimate by the formula above; `num_parameters` are those of the encoder and of the predictor."""
    encoder, predictor = num_parameters
    trained = encoder + predictor
    is_bf16 = config.optim.precision == "bf16"
    whole, part = 4.0 * trained, 4.0 * trained / world_size
    copy = part if stage in (1, 2) else 0.0
    stacks = _stacks(config, counts)
    kept = sum(stack.tokens * stack.depth * _block_bytes(config, stack, checkpoints_activations) for stack in stacks)
    teacher_stack = _encoder_stack(config, float(config.grid**2))
    views = 2 * 2 * 3 * 4 * config.views.size**2
    workspace = teacher_stack.tokens * _block_bytes(config, teacher_stack, False) + views
    return Memory(
        weights=part if stage == 3 else whole,
        gradients=part if stage >= 2 else whole,
        adam=2 * part + copy if stage >= 1 else 2 * whole,
        teacher=4.0 * encoder,
        bf16_copies=2.0 * trained if is_bf16 else 0.0,
        activations=micro_batch_size * kept,
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
    num_tokens = len(config.views.entries) if predictor.conditioning == "sequence" else 0
    stack = _Stack(
        dim=predictor.dim,
        hidden_dim=int(predictor.dim * predictor.mlp_ratio),
        num_heads=predictor.num_heads,
        depth=predictor.depth,
        tokens=float((counts.context + counts.target).mean()) + num_tokens,
    )
    return _encoder_stack(config, float(counts.context.mean())), stack


def _block_bytes(config: RunConfig, stack: _Stack, checkpoints_activations: bool) -> float:
    """Return what one block keeps per token."""
    is_bf16 = config.optim.precision == "bf16"
    if checkpoints_activations:
        return (6.0 if is_bf16 else 8.0) * stack.dim
    linear = 20.0 * stack.dim + 4 * stack.hidden_dim if is_bf16 else 32.0 * stack.dim + 8 * stack.hidden_dim
    if config.runtime.ops == "fused":
        return linear + 4 * stack.num_heads
    # queries, keys and values packed and padded; weights of the softmax; where each row goes
    padded, weight = (6, 6) if is_bf16 else (12, 4)
    return linear + padded * stack.dim + (weight * stack.tokens + 24) * stack.num_heads
