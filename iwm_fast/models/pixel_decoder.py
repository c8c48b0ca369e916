"""The pixel decoder: tokens of all patches of an image in, the image out; a window through which tokens can be seen.

It is deterministic and trained on the squared error of pixels, so it invents nothing: where tokens leave an image open,
the decoder shows the mean of the images that they allow, which is blurred or grey.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwm_fast.config.finetuning import PixelDecoderConfig
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.layers import Block, Blocks, ResidualNorm, initialize_, sincos_positions
from iwm_fast.pipelines.config import Normalization
from iwm_fast.pipelines.transforms.normalization import to_unit_range


@dataclass(frozen=True, kw_only=True)
class PixelDecoderSpec:
    """What a pixel decoder is built from, and whose tokens it decodes; stored beside its weights."""

    decoder: PixelDecoderConfig
    step: int
    """Optimiser steps of the checkpoint whose tokens it decodes."""
    token_dim: int
    """Width of these tokens."""
    grid: int
    """Number of patches along one side of an image."""
    patch_size: int
    """Side of a patch in pixels."""
    pixel_mean: tuple[float, float, float]
    """Mean with which the run normalises pixels."""
    pixel_std: tuple[float, float, float]
    """Standard deviation with which the run normalises pixels."""


class PixelDecoder(nn.Module):
    """Decodes the teacher's layer-normalised tokens, or predictions of them, by a small transformer.

    With depth 0, it is a linear map from each token to the pixels of its patch.
    """

    def __init__(self, spec: PixelDecoderSpec) -> None:
        super().__init__()
        self.spec: PixelDecoderSpec = spec
        sizes = spec.decoder
        self.transformer = _Transformer(sizes, spec.token_dim, spec.grid) if sizes.depth else None
        self.to_pixels = nn.Linear(sizes.dim if sizes.depth else spec.token_dim, 3 * spec.patch_size**2)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B 3 H W"]:
        """Return images with normalised pixels."""
        if self.transformer is not None:
            tokens = self.transformer(tokens)
        grid, side = self.spec.grid, self.spec.patch_size
        pixels = self.to_pixels(tokens).unflatten(2, (3, side, side)).unflatten(1, (grid, grid))
        return pixels.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    @torch.no_grad()
    def decode(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B 3 H W"]:
        """Return images with colours from 0 to 1.

        Args:
            tokens: tokens of all patches, as `WorldModel.encode_targets` and `WorldModel.predict` return them.

        Raises:
            ValueError: if the tokens have another number or width.
        """
        num_patches, dim = self.spec.grid**2, self.spec.token_dim
        if tuple(tokens.shape[1:]) != (num_patches, dim):
            raise ValueError(
                f"tokens must have the shape (B, {num_patches}, {dim}), as those of all patches of the run that the "
                f"decoder belongs to, got {tuple(tokens.shape)}"
            )
        normalization = Normalization(self.spec.pixel_mean, self.spec.pixel_std)
        return to_unit_range(self(tokens).float(), normalization).clamp(0, 1)


class _Transformer(nn.Module):
    """Projects tokens to the decoder's width and lets the patches of an image exchange what they know."""

    def __init__(self, sizes: PixelDecoderConfig, token_dim: int, grid: int) -> None:
        super().__init__()
        self.embed = nn.Linear(token_dim, sizes.dim)
        self.register_buffer("positions", sincos_positions(sizes.dim, grid), persistent=False)
        self.positions: Tensor
        # The reference operations run on every device, and a few blocks gain little from kernels.
        blocks = (Block(sizes.dim, sizes.num_heads, sizes.mlp_ratio, REFERENCE) for _ in range(sizes.depth))
        self.blocks = Blocks(blocks)
        self.norm = ResidualNorm(sizes.dim, REFERENCE)

    def forward(self, tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N P"]:
        num_images, num_patches, _ = tokens.shape
        packed = (self.embed(tokens) + self.positions).flatten(0, 1)
        packed, update = self.blocks(packed, Sequences.of_equal_length(num_patches))
        return self.norm(packed, update)[1].unflatten(0, (num_images, num_patches))


def build_pixel_decoder(spec: PixelDecoderSpec, seed: int) -> PixelDecoder:
    """Build a decoder on the CPU, with initial weights that depend on the seed only."""
    decoder = PixelDecoder(spec)
    initialize_(decoder, torch.Generator().manual_seed(seed))
    return decoder
