"""The vision transformer, over all patches of an image or some of them; its state dict loads strictly into timm's."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from iwm_fast.config.run import EncoderConfig
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.ops import Ops
from iwm_fast.models.layers import Block, Blocks, ResidualNorm, sincos_positions
from iwm_fast.pipelines.batch import RaggedIndex


class PatchEmbed(nn.Module):
    """Linear embedding of patches.

    The weight has the shape of timm's convolution, (D, 3, patch_size, patch_size). A convolution would embed all
    patches; the linear map embeds only those that are needed.
    """

    def __init__(self, patch_size: int, dim: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def external_parameters(self) -> list[nn.Parameter]:
        """Return parameters that `forward` reads without calling their layer; ZeRO stage 3 must gather them."""
        return list(self.proj.parameters())

    def forward(self, images: Float[Tensor, "B 3 H W"], index: RaggedIndex | None) -> Float[Tensor, "M D"]:
        """Embed the patches of `index`, or all if it is None; the pixels of other patches are not read."""
        size = self.patch_size
        rows, columns = images.shape[2] // size, images.shape[3] // size
        patches = images.unflatten(3, (columns, size)).unflatten(2, (rows, size)).permute(0, 2, 4, 1, 3, 5)
        if index is None:
            patches = patches.flatten(0, 2)
        else:
            # A row counts the patches of all images.
            image, patch = index.row // (rows * columns), index.patch
            patches = patches[image, patch // columns, patch % columns]
        return F.linear(patches.flatten(1), self.proj.weight.flatten(1), self.proj.bias)


class Encoder(nn.Module):
    """Vision transformer without class token: fixed 2-D sine-cosine positions, pre-norm blocks, final LayerNorm."""

    def __init__(self, config: EncoderConfig, image_size: int, ops: Ops, *, recompute: bool = False) -> None:
        super().__init__()
        self.image_size: int = image_size
        self.dim: int = config.dim
        self.grid: int = image_size // config.patch_size
        """Number of patches per row and per column of an image."""
        self.patch_embed = PatchEmbed(config.patch_size, config.dim)
        self.register_buffer("pos_embed", sincos_positions(config.dim, self.grid)[None])
        self.pos_embed: Tensor
        blocks = (Block(config.dim, config.num_heads, config.mlp_ratio, ops) for _ in range(config.depth))
        self.blocks = Blocks(blocks, recompute=recompute)
        self.norm = ResidualNorm(config.dim, ops)

    def forward(self, images: Float[Tensor, "B 3 H W"], index: RaggedIndex | None) -> Float[Tensor, "M D"]:
        """Encode the patches of `index` as if there were no others, or all patches if it is None.

        Returns:
            The tokens of all images, packed in the order of `index`; (B * N, D) for all patches.

        Raises:
            ValueError: if the images do not have the size that the encoder was built for.
        """
        return self._normalize(*self.blocks(*self._embed(images, index)))

    def last_layers(self, images: Float[Tensor, "B 3 H W"], num_layers: int) -> Float[Tensor, "M E"]:
        """Encode all patches, and return the outputs of the last blocks, each after the final norm, side by side.

        Source: `get_intermediate_layers` in the code of DINO; I-JEPA, appendix A.

        Returns:
            (B * N, num_layers * D), with the last block's output at the end.

        Raises:
            ValueError: if the images do not have the size that the encoder was built for.
        """
        first = len(self.blocks) - num_layers
        outputs = enumerate(self.blocks.each(*self._embed(images, None)))
        return torch.cat([self._normalize(*output) for number, output in outputs if number >= first], dim=1)

    def _embed(
        self, images: Float[Tensor, "B 3 H W"], index: RaggedIndex | None
    ) -> tuple[Float[Tensor, "M D"], Sequences]:
        """Return the embedded patches with their positions, and where the sequence of each image begins.

        Raises:
            ValueError: if the images do not have the size that the encoder was built for.
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
            sequences = Sequences.of_equal_length(self.grid**2)
        else:
            tokens = tokens + self.pos_embed[0, index.patch]
            sequences = Sequences.from_lengths(index.offsets, index.lengths)
        return tokens, sequences

    def _normalize(self, tokens: Float[Tensor, "M D"], update: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
        # The tokens are the teacher's targets, so the last norm runs in float32 like the residual stream.
        with torch.autocast(tokens.device.type, enabled=False):
            return self.norm(tokens, update)[1]
