"""Transformer blocks on packed tokens, positions and initialisation; parameter names are timm's."""

from collections import deque
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.ops import Ops

# As in the ViTs of timm and I-JEPA; torch's own default is 1e-5.
NORM_EPS = 1e-6
# Width of ViT-B, for which the usual initial standard deviation of 0.02 was chosen.
BASE_WIDTH = 768


class ResidualNorm(nn.Module):
    """Adds an update to the residual stream and applies LayerNorm to the sum, in one pass over both."""

    def __init__(self, dim: int, ops: Ops) -> None:
        super().__init__()
        self.residual_norm = ops.residual_norm
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(
        self, tokens: Float[Tensor, "M D"], update: Float[Tensor, "M D"] | None
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"]]:
        """Return the sum of tokens and update, and its LayerNorm; without an update, the tokens and their LayerNorm."""
        if update is None:
            return tokens, F.layer_norm(tokens, tokens.shape[-1:], self.weight, self.bias, NORM_EPS)
        return self.residual_norm(update, tokens, self.weight, self.bias, NORM_EPS)


class Attention(nn.Module):
    """Multi-head self-attention within each packed sequence."""

    def __init__(self, dim: int, num_heads: int, ops: Ops) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.ragged_attention = ops.ragged_attention
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Float[Tensor, "M D"], sequences: Sequences) -> Float[Tensor, "M D"]:
        """Attend within each sequence of packed tokens."""
        rows, dim = tokens.shape
        qkv = self.qkv(tokens).view(rows, 3, self.num_heads, dim // self.num_heads)
        return self.proj(self.ragged_attention(qkv, sequences).reshape(rows, dim))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """Pre-norm transformer block; under autocast the residual stream keeps the dtype of the input tokens.

    The block returns its last update without adding it. The following block or norm adds and normalises in one pass.
    """

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, ops: Ops) -> None:
        super().__init__()
        self.norm1 = ResidualNorm(dim, ops)
        self.attn = Attention(dim, num_heads, ops)
        self.norm2 = ResidualNorm(dim, ops)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(
        self,
        tokens: Float[Tensor, "M D"],
        update: Float[Tensor, "M D"] | None,
        sequences: Sequences,
        scale: Float[Tensor, "2 M"] | None = None,
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"]]:
        """Transform tokens of packed sequences.

        Args:
            tokens: the residual stream.
            update: the previous block's update, which is not yet added to the stream; None for the first block.
            sequences: where each sequence begins.
            scale: factors of each row's attention update and MLP update, for stochastic depth; None for 1.

        Returns:
            The residual stream and the update that is still to be added to it.
        """
        tokens, normed = self.norm1(tokens, update)
        attended = self.attn(normed, sequences)
        # Casting the factors preserves the dtype of the updates, which is bfloat16 under autocast.
        if scale is not None:
            attended = attended * scale[0, :, None].to(attended.dtype)
        tokens, normed = self.norm2(tokens, attended)
        mapped = self.mlp(normed)
        return tokens, mapped if scale is None else mapped * scale[1, :, None].to(mapped.dtype)


class Blocks(nn.ModuleList):
    """A sequence of blocks, with optional stochastic depth and activation checkpointing."""

    def __init__(self, blocks: Iterable[Block], *, recompute: bool = False) -> None:
        """Build the sequence; with `recompute`, a block stores only its input for the backward pass."""
        super().__init__(blocks)
        self.recompute: bool = recompute
        self.drop_path: float = 0.0
        """Share of images that skip an update of the last block; see `set_drop_path_`."""
        self.num_frozen: int = 0
        """Number of blocks at the beginning whose updates are never skipped."""

    def forward(
        self, tokens: Float[Tensor, "M D"], sequences: Sequences
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"]]:
        """Return the residual stream and the last block's update, which is not yet added to it; see `Block.forward`."""
        # Unlike a list, it keeps only the last of the blocks' outputs in memory.
        (last,) = deque(self.each(tokens, sequences), maxlen=1)
        return last

    def each(
        self, tokens: Float[Tensor, "M D"], sequences: Sequences
    ) -> Iterator[tuple[Float[Tensor, "M D"], Float[Tensor, "M D"]]]:
        """Yield the residual stream and the update of each block in turn."""
        update = None
        is_dropping = self.training and self.drop_path > 0
        scales = self._draw_scales(tokens, sequences) if is_dropping else [None] * len(self)
        for block, scale in zip(self, scales, strict=True):
            # Without gradients, as for the teacher, there is no backward pass to recompute for.
            if self.recompute and torch.is_grad_enabled():
                # Stochastic depth is drawn outside the blocks, so the second forward pass needs no generator state.
                tokens, update = checkpoint(
                    block, tokens, update, sequences, scale, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens, update = block(tokens, update, sequences, scale)
            yield tokens, update

    def _draw_scales(self, tokens: Float[Tensor, "M D"], sequences: Sequences) -> Float[Tensor, "blocks 2 M"]:
        """Draw the factor of each update: 0 if it is dropped, otherwise 1 / (1 - drop rate), so that its mean is 1.

        Attention and MLP (the second axis) are drawn independently, and all rows of an image have the same factor.

        Source: arXiv 1603.09382, drawn for each image as in timm.
        """
        rows, offsets = len(tokens), sequences.offsets
        lengths = (
            torch.full((sequences.count(rows),), sequences.longest, device=tokens.device)
            if offsets is None
            else offsets.diff()
        )
        keep_rate = 1 - torch.linspace(0, self.drop_path, len(self), device=tokens.device)[:, None, None]
        keep_rate[: self.num_frozen] = 1
        is_kept = torch.rand(len(self), 2, len(lengths), device=tokens.device) < keep_rate
        # output_size spares repeat_interleave a device sync to find the sum of the lengths.
        return (is_kept / keep_rate).repeat_interleave(lengths, dim=2, output_size=rows)


def set_drop_path_(module: nn.Module, rate: float) -> None:
    """Set in place the share of images that skip the updates of blocks in training (stochastic depth).

    In each `Blocks` of the module, the share rises linearly from 0 at the first block to `rate` at the last one, but
    is 0 for blocks that are frozen. Random numbers come from torch's global generator.
    """
    for submodule in module.modules():
        if isinstance(submodule, Blocks):
            submodule.drop_path = rate
            is_trained = [any(weight.requires_grad for weight in block.parameters()) for block in submodule]
            submodule.num_frozen = is_trained.index(True) if any(is_trained) else len(submodule)


def compile_blocks(module: nn.Module) -> None:
    """Let torch.compile compile every block of a module at its first call.

    Blocks of equal width share the compiled code, for any number of rows.
    """
    # All blocks are one piece of code to Dynamo, which counts its versions: encoder, teacher and predictor, first block
    # or not, with a gradient or without. Beyond the limit, by default 8, it runs them eagerly without a word.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    # By default Dynamo splits graphs under DistributedDataParallel at the borders of its buckets of gradients, so that
    # communication begins before the backward pass ends. Here each block is a graph of its own, which suffices.
    torch._dynamo.config.optimize_ddp = False
    for submodule in module.modules():
        if isinstance(submodule, Block):
            # In place: torch.compile(block) would return a wrapper and change the names of the parameters.
            submodule.compile()


def sincos_positions(dim: int, grid: int) -> Float[Tensor, "N D"]:
    """Return fixed 2-D sine-cosine positions of a square grid in raster order.

    The first half of the width encodes the column, the second half the row. Each half is [sin | cos] of the coordinate
    times the frequencies 10000^(-4 i / dim).

    Raises:
        ValueError: if `dim` is not a multiple of 4.

    Source: the code of MAE and I-JEPA, `get_2d_sincos_pos_embed`.
    """
    if dim % 4 != 0:
        raise ValueError(f"dim must be a multiple of 4 for 2-D sine-cosine positions, got {dim}")
    if torch.get_default_device().type == "meta":
        # Only the shape matters there, and for arithmetic PyTorch would import its compiler, which takes seconds.
        return torch.empty(grid**2, dim)
    # In float64, as in the source, and rounded once at the end.
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    encoding = torch.cat([angle.sin(), angle.cos()], dim=1)
    columns, rows = encoding.repeat(grid, 1), encoding.repeat_interleave(grid, dim=0)
    return torch.cat([columns, rows], dim=1).float()


@torch.no_grad()
def initialize_(module: nn.Module, generator: torch.Generator) -> None:
    """Initialise all parameters in place: truncated normal weights, zero biases, norms with weight 1.

    The standard deviation is 0.02 * sqrt(768 / width), which is 0.02 for ViT-B, so that a layer preserves the size of
    its signals equally well at any width. With 0.02, a patch embedding of 48 pixel values makes images 5 times smaller
    than the positions that are added to them, and small models collapse to predicting positions.

    The residual projections of the l-th block (from 1) are then divided by sqrt(2 l), so that the residual stream
    does not grow with depth. (I-JEPA's code intends this too, but initialises again afterwards.) Torch's global
    generator is not used.

    Args:
        module: the module, on the CPU. All its blocks count as one sequence.
        generator: a generator on the CPU, which advances.
    """
    for submodule in module.modules():
        for name, parameter in submodule.named_parameters(recurse=False):
            if name.endswith("bias"):
                parameter.zero_()
            elif isinstance(submodule, ResidualNorm):
                parameter.fill_(1.0)
            else:
                # The smaller of outputs and inputs; vectors such as the mask token keep 0.02.
                width = min(parameter.shape[0], parameter[0].numel()) if parameter.ndim > 1 else BASE_WIDTH
                nn.init.trunc_normal_(parameter, std=0.02 * (BASE_WIDTH / width) ** 0.5, generator=generator)
    blocks = [submodule for submodule in module.modules() if isinstance(submodule, Block)]
    for layer, block in enumerate(blocks, start=1):
        block.attn.proj.weight.div_((2 * layer) ** 0.5)
        block.mlp.fc2.weight.div_((2 * layer) ** 0.5)
