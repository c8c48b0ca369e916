"""Transformer blocks on packed tokens, positions and initial weights; parameter names are timm's."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int32
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from iwm_fast.kernels.ops import Ops

# timm's and I-JEPA's LayerNorm; torch's own default is 1e-5
NORM_EPS = 1e-6
# ViT-B's, for which the field's usual standard deviation of 0.02 was chosen
BASE_WIDTH = 768


class ResidualNorm(nn.Module):
    """LayerNorm of tokens to which an update is still to be added."""

    def __init__(self, dim: int, ops: Ops) -> None:
        super().__init__()
        self.residual_norm = ops.residual_norm
        self.weight = nn.Parameter(torch.ones(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(
        self, tokens: Float[Tensor, "M D"], update: Float[Tensor, "M D"] | None
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"]]:
        """Return the sum and its norm; without an update, the tokens and theirs."""
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

    def forward(
        self, tokens: Float[Tensor, "M D"], offsets: Int32[Tensor, "images"] | None, longest: int
    ) -> Float[Tensor, "M D"]:
        """Attend among the rows between two offsets; without offsets every `longest` rows are a sequence."""
        rows, dim = tokens.shape
        qkv = self.qkv(tokens).view(rows, 3, self.num_heads, dim // self.num_heads)
        return self.proj(self.ragged_attention(qkv, offsets, longest).reshape(rows, dim))


class Mlp(nn.Module):
    """Two layers with an exact GELU between."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, tokens: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        return self.fc2(F.gelu(self.fc1(tokens)))


class Block(nn.Module):
    """Pre-norm transformer block; under autocast the residual stream keeps the dtype of the tokens given.

    The last update of a block is added where it is normalised, one pass over both: by the block or norm that follows.
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
        offsets: Int32[Tensor, "images"] | None,
        longest: int,
        scale: Float[Tensor, "2 M"] | None = None,
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"]]:
        """Transform tokens of packed sequences.

        Args:
            tokens: the residual stream.
            update: what the block before left to add to it; None for the first block.
            offsets: where sequences begin, as in `iwm_fast.kernels.attention.op`.
            longest: likewise.
            scale: what each row's update by the attention and by the MLP is multiplied with, for stochastic depth.

        Returns:
            The residual stream and the update that is still to be added to it.
        """
        tokens, normed = self.norm1(tokens, update)
        attended = self.attn(normed, offsets, longest)
        if scale is not None:
            attended = attended * scale[0, :, None].to(attended.dtype)
        tokens, normed = self.norm2(tokens, attended)
        mapped = self.mlp(normed)
        return tokens, mapped if scale is None else mapped * scale[1, :, None].to(mapped.dtype)


class Blocks(nn.ModuleList):
    """Blocks one after the other."""

    def __init__(self, blocks: Iterable[Block], *, recompute: bool = False) -> None:
        """Take the blocks, and whether each is to keep only its input for the backward pass, which then computes it."""
        super().__init__(blocks)
        self.recompute = recompute
        self.drop_path = 0.0

    def forward(
        self, tokens: Float[Tensor, "M D"], offsets: Int32[Tensor, "images"] | None, longest: int
    ) -> tuple[Float[Tensor, "M D"], Float[Tensor, "M D"] | None]:
        """Transform tokens; arguments and results are those of `Block`."""
        update = None
        is_dropping = self.training and self.drop_path > 0
        scales = self._draw_scales(tokens, offsets, longest) if is_dropping else [None] * len(self)
        for block, scale in zip(self, scales, strict=True):
            if self.recompute and torch.is_grad_enabled():
                # nothing is drawn in a block
                tokens, update = checkpoint(
                    block, tokens, update, offsets, longest, scale, use_reentrant=False, preserve_rng_state=False
                )
            else:
                tokens, update = block(tokens, update, offsets, longest, scale)
        return tokens, update

    def _draw_scales(
        self, tokens: Float[Tensor, "M D"], offsets: Int32[Tensor, "images"] | None, longest: int
    ) -> Float[Tensor, "blocks 2 M"]:
        """Draw for each block, image and update whether it is dropped (0), or kept and grown to make up for that.

        Source: arXiv 1603.09382, drawn for each image as in timm.
        """
        rows = len(tokens)
        lengths = torch.full((rows // longest,), longest, device=tokens.device) if offsets is None else offsets.diff()
        kept = 1 - torch.linspace(0, self.drop_path, len(self), device=tokens.device)[:, None, None]
        is_kept = torch.rand(len(self), 2, len(lengths), device=tokens.device) < kept
        return (is_kept / kept).repeat_interleave(lengths, dim=2, output_size=rows)


def set_drop_path_(module: nn.Module, rate: float) -> None:
    """Let a share of images skip the updates of blocks in training, in place.

    In each stack of blocks in the module the share rises linearly from 0 at the first block to `rate` at the last one;
    attention and MLP are skipped independently. Draws come from torch's global generator.
    """
    for part in module.modules():
        if isinstance(part, Blocks):
            part.drop_path = rate


def compile_blocks(module: nn.Module) -> None:
    """Have every block of a module compiled when it is first called; names of parameters stay as they are.

    Blocks of one width share one compiled code, for any number of rows.
    """
    for part in module.modules():
        if isinstance(part, Block):
            part.compile()


def sincos_positions(dim: int, grid: int) -> Float[Tensor, "N D"]:
    """Return fixed 2-D sine-cosine positions of a square grid in raster order.

    The first half of the width encodes the column, the second the row; each is [sin | cos] over frequencies
    10000^(-4 i / dim).

    Raises:
        ValueError: if `dim` is not a multiple of 4.

    Source: MAE and I-JEPA code, `get_2d_sincos_pos_embed`.
    """
    if dim % 4 != 0:
        raise ValueError(f"dim must be a multiple of 4 for 2-D sine-cosine positions, got {dim}")
    frequency = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(grid, dtype=torch.float64)[:, None] * frequency
    line = torch.cat([angle.sin(), angle.cos()], dim=1)
    by_column, by_row = line.repeat(grid, 1), line.repeat_interleave(grid, dim=0)
    return torch.cat([by_column, by_row], dim=1).float()


@torch.no_grad()
def initialize_(module: nn.Module, generator: torch.Generator) -> None:
    """Overwrite all parameters in place: truncated normal, zero biases, norms one and zero.

    The standard deviation is 0.02 for ViT-B's width of 768 and grows as the root of the width shrinks: a layer then
    passes signals on in the same size at any width. At 0.02, a patch embedding of 48 pixel values leaves images 5 times
    smaller than the positions added to them, and small models collapse to predicting positions.

    The residual projections of the l-th block (from 1) are then divided by sqrt(2 l), so that the residual stream
    does not grow with depth. (I-JEPA's code means to, but initialises again afterwards.) Nothing is drawn from the
    global random state.

    Args:
        module: one stack of blocks on the CPU, with whatever surrounds it.
        generator: on the CPU; it advances.
    """
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            if name.endswith("bias"):
                parameter.zero_()
            elif isinstance(part, ResidualNorm):
                parameter.fill_(1.0)
            else:
                width = min(parameter.shape[0], parameter[0].numel()) if parameter.ndim > 1 else BASE_WIDTH
                nn.init.trunc_normal_(parameter, std=0.02 * (BASE_WIDTH / width) ** 0.5, generator=generator)
    blocks = [part for part in module.modules() if isinstance(part, Block)]
    for layer, block in enumerate(blocks, start=1):
        block.attn.proj.weight.div_((2 * layer) ** 0.5)
        block.mlp.fc2.weight.div_((2 * layer) ** 0.5)
