"""The predictor, or world model: from context tokens of the source view and an action to tokens of the target view."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from iwm_fast.config.run import PredictorConfig
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.ops import Ops
from iwm_fast.kernels.predictor_input.layout import PatchIndex, packed_layout
from iwm_fast.kernels.predictor_input.op import FeatureMixer
from iwm_fast.models.layers import Block, Blocks, ResidualNorm, sincos_positions
from iwm_fast.pipelines.batch import RaggedIndex


class FeatureConditioning(nn.Module):
    """Mixes the action into each mask token after its position is added.

    Source: IWM, where it is the default; three layers with ReLU as in CheXWorld's code.
    """

    def __init__(self, dim: int, num_actions: int) -> None:
        super().__init__()
        linear = nn.Linear(dim + num_actions, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.layers = nn.Sequential(linear[0], nn.ReLU(), linear[1], nn.ReLU(), linear[2])

    @torch.no_grad()
    def initialize_(self, generator: torch.Generator) -> None:
        """Initialise the weights in place so that outputs are about as large as inputs.

        No residual connection bypasses these layers. With a standard deviation of 0.02, positions and action would
        become 100 times smaller than the context tokens, and the LayerNorm that follows would enlarge the first
        gradients by that factor.

        Args:
            generator: a generator on the CPU, which advances.
        """
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        # A ReLU halves the mean square of its input, so the layers before one have a gain of 2 (He et al., 2015).
        for layer, gain in zip(linear, (2.0, 2.0, 1.0), strict=True):
            nn.init.trunc_normal_(layer.weight, std=(gain / layer.in_features) ** 0.5, generator=generator)

    def forward(self, action: Float[Tensor, "B A"]) -> FeatureMixer:
        """Return action and layer parameters, which `ops.predictor_input` applies while it packs the tokens."""
        return FeatureMixer(action, *self.layers.parameters())


class SequenceConditioning(nn.Module):
    """Converts each action entry into a token by a linear layer of its own.

    A layer shared by all entries would make them indistinguishable, because attention does not see their order.

    Source: IWM.
    """

    def __init__(self, dim: int, num_actions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_actions, dim))
        self.bias = nn.Parameter(torch.zeros(num_actions, dim))

    def forward(self, action: Float[Tensor, "B A"]) -> Float[Tensor, "B A P"]:
        return action[:, :, None] * self.weight + self.bias


class Predictor(nn.Module):
    """Transformer over the sequence [context | mask tokens | action tokens] of each image."""

    def __init__(
        self,
        config: PredictorConfig,
        *,
        encoder_dim: int,
        grid: int,
        num_actions: int,
        ops: Ops,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        dim = config.dim
        self.assemble = ops.predictor_input
        self.embed = nn.Linear(encoder_dim, dim)
        # Not in the state dict, because it follows from width and grid, and the grid may change after training.
        self.register_buffer("positions", sincos_positions(dim, grid), persistent=False)
        self.positions: Tensor
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.mixer = FeatureConditioning(dim, num_actions) if config.conditioning == "feature" else None
        self.tokenizer = SequenceConditioning(dim, num_actions) if config.conditioning == "sequence" else None
        blocks = (Block(dim, config.num_heads, config.mlp_ratio, ops) for _ in range(config.depth))
        self.blocks = Blocks(blocks, recompute=recompute)
        self.norm = ResidualNorm(dim, ops)
        self.project = nn.Linear(dim, encoder_dim)

    def external_parameters(self) -> list[nn.Parameter]:
        """Return parameters that `forward` reads without calling their layer; ZeRO stage 3 must gather them."""
        return [] if self.mixer is None else list(self.mixer.parameters())

    def forward(
        self,
        context_tokens: Float[Tensor, "C D"],
        action: Float[Tensor, "B A"],
        context: RaggedIndex,
        target: RaggedIndex,
        *,
        extra_tokens: Float[Tensor, "B E P"] | None = None,
    ) -> Float[Tensor, "T D"]:
        """Predict the tokens at the target positions of the view that `action` leads to.

        Args:
            context_tokens: the encoder's tokens of the context patches.
            action: the change from source view to target view; zero means no change.
            context: the visible patches of the source view.
            target: the patches of the target view to predict.
            extra_tokens: tokens of the predictor's width, such as one that names a task. They are appended to each
                image's sequence, after the action tokens, and have no output.
        """
        mixer = None if self.mixer is None else self.mixer(action)
        action_tokens = None if self.tokenizer is None else self.tokenizer(action)
        num_appended = 0 if action_tokens is None else action_tokens.shape[1]
        patches = PatchIndex(context.row, target.row)
        sizes = {"num_context": len(patches.context), "num_targets": len(patches.targets)}
        layout = packed_layout(context.offsets, target.offsets, num_appended, **sizes)
        tokens = self.assemble(
            self.embed(context_tokens),
            self.mask_token,
            self.positions,
            patches,
            layout,
            action_tokens=action_tokens,
            mixer=mixer,
        )
        if extra_tokens is not None:
            tokens = _append_tokens(tokens, layout.offsets, extra_tokens)
            num_appended += extra_tokens.shape[1]
            layout = packed_layout(context.offsets, target.offsets, num_appended, **sizes)
        # By image, not the longest context plus the longest target: the default masks are complementary, so that all
        # sequences have the same length, and attention needs neither offsets nor padding.
        lengths = [sum(pair) + num_appended for pair in zip(context.lengths, target.lengths, strict=True)]
        tokens, update = self.blocks(tokens, Sequences.from_lengths(layout.offsets, lengths))
        # Only the target rows are needed, so the last norm and the projection skip the others.
        tokens, update = (rows.index_select(0, layout.targets) for rows in (tokens, update))
        return self.project(self.norm(tokens, update)[1])

    def predicted_patches(self, context: RaggedIndex, target: RaggedIndex) -> RaggedIndex:
        """Return the patches that the rows of the output belong to: the target patches."""
        return target


def _append_tokens(
    tokens: Float[Tensor, "L P"], offsets: Int32[Tensor, "images"], extra: Float[Tensor, "B E P"]
) -> Float[Tensor, "M P"]:
    """Return packed sequences with E further tokens at the end of each image's sequence."""
    # This is one more pass over all tokens. Pretraining has no extra tokens, so it does not pay for it.
    num_images, num_extra, _ = extra.shape
    image = torch.arange(num_images, device=tokens.device)
    image_of_row = torch.repeat_interleave(image, offsets.diff(), output_size=len(tokens))
    # The extra tokens of all earlier images shift a row.
    new_row = torch.arange(len(tokens), device=tokens.device) + num_extra * image_of_row
    extra_row = (offsets[1:] + num_extra * image)[:, None] + torch.arange(num_extra, device=tokens.device)
    stacked = torch.cat([tokens, extra.flatten(0, 1).to(tokens.dtype)])
    return torch.empty_like(stacked).index_copy_(0, torch.cat([new_row, extra_row.flatten()]), stacked)


class IdentityPredictor(nn.Module):
    """The predictor of depth 0: the teacher's tokens are predicted to equal the context tokens at the same patches."""

    def forward(
        self,
        context_tokens: Float[Tensor, "C D"],
        action: Float[Tensor, "B A"],
        context: RaggedIndex,
        target: RaggedIndex,
    ) -> Float[Tensor, "C D"]:
        """Return the context tokens unchanged."""
        return context_tokens

    def predicted_patches(self, context: RaggedIndex, target: RaggedIndex) -> RaggedIndex:
        """Return the patches that the rows of the output belong to: the context patches."""
        return context


def build_predictor(
    config: PredictorConfig, *, encoder_dim: int, grid: int, num_actions: int, ops: Ops, recompute: bool = False
) -> Predictor | IdentityPredictor:
    """Build the predictor that the settings describe; depth 0 is the identity."""
    if config.depth == 0:
        return IdentityPredictor()
    sizes = {"encoder_dim": encoder_dim, "grid": grid, "num_actions": num_actions}
    return Predictor(config, **sizes, ops=ops, recompute=recompute)
