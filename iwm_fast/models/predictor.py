"""The world model: context tokens of the source view and an action in, tokens of the target view out."""

import torch
from jaxtyping import Float, Int32
from torch import Tensor, nn

from iwm_fast.config.run import PredictorConfig
from iwm_fast.kernels.ops import Ops
from iwm_fast.kernels.predictor_input.layout import PatchIndex, packed_layout
from iwm_fast.kernels.predictor_input.op import Mixer
from iwm_fast.models.layers import Block, Blocks, ResidualNorm, sincos_positions
from iwm_fast.pipelines.batch import RaggedIndex


class FeatureConditioning(nn.Module):
    """Mix the action into each position-augmented mask token.

    Source: IWM section 3 (the default there); three layers with ReLU as in CheXWorld's code.
    """

    def __init__(self, dim: int, num_actions: int) -> None:
        super().__init__()
        sizes = nn.Linear(dim + num_actions, dim), nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.layers = nn.Sequential(sizes[0], nn.ReLU(), sizes[1], nn.ReLU(), sizes[2])

    @torch.no_grad()
    def initialize_(self, generator: torch.Generator) -> None:
        """Overwrite the weights so that tokens leave about as large as they enter.

        No residual leads around these layers. At 0.02, as everywhere else, positions and action would arrive 100 times
        smaller than the visible tokens, and the LayerNorm behind would blow the first gradients up by as much.
        """
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        for layer, gain in zip(linear, (2.0, 2.0, 1.0), strict=True):
            nn.init.trunc_normal_(layer.weight, std=(gain / layer.in_features) ** 0.5, generator=generator)

    def forward(self, action: Float[Tensor, "B A"]) -> Mixer:
        """Hand out action and layers; the mask tokens are mixed where they are packed."""
        return Mixer(action, *self.layers.parameters())


class SequenceConditioning(nn.Module):
    """Turn each action entry into one token by a linear layer of its own.

    One layer for all would not do: attention sees a set, and must tell the entries apart. Source: IWM section 3.
    """

    def __init__(self, dim: int, num_actions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_actions, dim))
        self.bias = nn.Parameter(torch.zeros(num_actions, dim))

    def forward(self, action: Float[Tensor, "B A"]) -> Float[Tensor, "B A P"]:
        return action[:, :, None] * self.weight + self.bias


class Predictor(nn.Module):
    """Transformer over [context | mask tokens | action tokens] of each image."""

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
        # not in the state dict: it follows from width and grid, and a finer grid may be used after training
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
        """Return what `forward` takes from layers that it does not call itself: ZeRO-3 must fetch it."""
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
            context_tokens: the encoder's, of the visible patches.
            action: the change to be applied; zero means none.
            context: the visible patches.
            target: the patches to predict.
            extra_tokens: of the predictor's width, such as one that names a task; they stand at the end of each image's
                sequence, behind action tokens if there are some, and have no output.
        """
        mixer = None if self.mixer is None else self.mixer(action)
        action_tokens = None if self.tokenizer is None else self.tokenizer(action)
        num_tokens = 0 if action_tokens is None else action_tokens.shape[1]
        patches = PatchIndex(context.row, target.row)
        sizes = {"num_context": len(patches.context), "num_targets": len(patches.targets)}
        rows = packed_layout(context.offsets, target.offsets, num_tokens, **sizes)
        tokens = self.assemble(
            self.embed(context_tokens),
            self.mask_token,
            self.positions,
            patches,
            rows,
            action_tokens=action_tokens,
            mixer=mixer,
        )
        if extra_tokens is not None:
            tokens = _append(tokens, rows.offsets, extra_tokens)
            num_tokens += extra_tokens.shape[1]
            rows = packed_layout(context.offsets, target.offsets, num_tokens, **sizes)
        longest = context.longest + target.longest + num_tokens
        tokens, update = self.blocks(tokens, rows.offsets, longest)
        tokens, update = (part.index_select(0, rows.targets) for part in (tokens, update))
        return self.project(self.norm(tokens, update)[1])

    def predicted_patches(self, context: RaggedIndex, target: RaggedIndex) -> RaggedIndex:
        """Return which patches the output's rows stand for."""
        return target


def _append(
    tokens: Float[Tensor, "L P"], offsets: Int32[Tensor, "images"], extra: Float[Tensor, "B E P"]
) -> Float[Tensor, "M P"]:
    """Lengthen the sequence of each image: one more pass over the rows, which pretraining does not have."""
    num_images, num_extra, _ = extra.shape
    image = torch.arange(num_images, device=tokens.device)
    of_row = torch.repeat_interleave(image, offsets.diff(), output_size=len(tokens))
    row = torch.arange(len(tokens), device=tokens.device) + num_extra * of_row
    token = torch.arange(num_extra, device=tokens.device)
    extra_row = (offsets[1:] + num_extra * image)[:, None] + token
    stacked = torch.cat([tokens, extra.flatten(0, 1).to(tokens.dtype)])
    return torch.empty_like(stacked).index_copy_(0, torch.cat([row, extra_row.flatten()]), stacked)


class IdentityPredictor(nn.Module):
    """No world model: the context tokens are compared with the teacher's at the same patches."""

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
        """Return which patches the output's rows stand for."""
        return context


def build_predictor(
    config: PredictorConfig, *, encoder_dim: int, grid: int, num_actions: int, ops: Ops, recompute: bool = False
) -> Predictor | IdentityPredictor:
    """Build the predictor that the settings name; depth 0 is the identity."""
    if config.depth == 0:
        return IdentityPredictor()
    sizes = {"encoder_dim": encoder_dim, "grid": grid, "num_actions": num_actions}
    return Predictor(config, **sizes, ops=ops, recompute=recompute)
