"""Vision transformer over all patches of an image, or over given ones; loads strictly into timm's."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iwm_fast.config.run import EncoderConfig
from iwm_fast.kernels.ops import Ops
from iwm_fast.models.layers import Block, Blocks, ResidualNorm, sincos_positions
from iwm_fast.pipelines.batch import RaggedIndex


class PatchEmbed(nn.Module):
    """Linear map of a patch's pixels; its weight has the shape of timm's convolution."""

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def external_parameters(self) -> list[nn.Parameter]:
        """Return what `forward` takes from a layer that it does not call: ZeRO-3 must fetch it."""
        return list(self.proj.parameters())

    def forward(self, images: Float[Tensor, "B 3 H W"], index: RaggedIndex | None) -> Float[Tensor, "M D"]:
        """Embed the patches of `index`, or all; pixels of other patches are not read."""
        size = self.patch_size
        rows, columns = images.shape[2] // size, images.shape[3] // size
        patches = images.unflatten(3, (columns, size)).unflatten(2, (rows, size)).permute(0, 2, 4, 1, 3, 5)
        if index is None:
            patches = patches.flatten(0, 2)
        else:
            image, patch = index.row // (rows * columns), index.patch
            patches = patches[image, patch // columns, patch % columns]
        return F.linear(patches.flatten(1), self.proj.weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """ViT without class token: fixed 2-D sine-cosine positions, pre-norm blocks, final LayerNorm."""

    def __init__(self, config: EncoderConfig, image_size: int, ops: Ops, *, recompute: bool = False) -> None:
        super().__init__()
        self.image_size = image_size
        self.dim = config.dim
        self.grid = image_size // config.patch_size
        self.patch_embed = PatchEmbed(config.patch_size, config.dim)
        self.register_buffer("pos_embed", sincos_positions(config.dim, self.grid)[None])
        self.pos_embed: Tensor
        blocks = (Block(config.dim, config.num_heads, config.mlp_ratio, ops) for _ in range(config.depth))
        self.blocks = Blocks(blocks, recompute=recompute)
        self.norm = ResidualNorm(config.dim, ops)

    def forward(self, images: Float[Tensor, "B 3 H W"], index: RaggedIndex | None) -> Float[Tensor, "M D"]:
        """Encode the patches of `index` as if there were no others, packed; or all patches, (B * N, D).

        Raises:
            ValueError: if the images do not have the size the encoder was built for.
        """
        if images.shape[-2:] != (self.image_size, self.image_size):
            height, width = images.shape[-2:]
            raise ValueError(
                f"images must be {self.image_size} x {self.image_size} pixels, got {height} x {width}; "
                "resize them, or build the encoder with views.size to match"
            )
        tokens = self.patch_embed(images, index)
        if index is None:
            tokens = tokens + self.pos_embed[0].repeat(images.shape[0], 1)
            offsets, longest = None, self.grid**2
        else:
            tokens = tokens + self.pos_embed[0, index.patch]
            offsets, longest = index.offsets, index.longest
        tokens, update = self.blocks(tokens, offsets, longest)
        # the last norm stays as exact as the stream: these are the teacher's targets
        with torch.autocast(tokens.device.type, enabled=False):
            return self.norm(tokens, update)[1]
