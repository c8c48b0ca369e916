"""The decoders that `iwm decode` trains, and the jobs that train them."""

from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from iwm_fast.config.finetuning import DecodeConfig
from iwm_fast.engines.optimizer import build_scaled_optimizer
from iwm_fast.evals.finetuning.networks import Encode, build_networks, freeze_encoder
from iwm_fast.evals.finetuning.run import FinetuneContext
from iwm_fast.evals.finetuning.task import Job
from iwm_fast.evals.finetuning.variants import describe_origin
from iwm_fast.models.layers import NORM_EPS
from iwm_fast.models.pixel_decoder import PixelDecoder, PixelDecoderSpec, build_pixel_decoder
from iwm_fast.pipelines.batch import Batch
from iwm_fast.world_model import WorldModel

DECODER, LINEAR, UNTRAINED = "decoder", "linear", "untrained_encoder"
"""The decoder, and its controls: a linear map from each token to its patch, and a decoder of the same size that sees
the tokens of an untrained encoder."""


class _Inputs(NamedTuple):
    tokens: Float[Tensor, "B N D"]
    view: Float[Tensor, "B 3 H W"]


class _OnTokens(nn.Module):
    """A decoder as the module of a job, whose inputs also hold what the loss needs."""

    def __init__(self, decoder: PixelDecoder) -> None:
        super().__init__()
        self.decoder: PixelDecoder = decoder

    def forward(self, inputs: _Inputs) -> Float[Tensor, "B 3 H W"]:
        return self.decoder(inputs.tokens)


@dataclass(frozen=True, kw_only=True)
class DecoderArm:
    """A decoder with the frozen encoder whose tokens it decodes."""

    decoder: PixelDecoder
    encode: Encode
    job: Job
    """Trains the decoder in place."""

    def decode_view(self, view: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """Encode normalised images and return what the decoder makes of their tokens, in colours from 0 to 1."""
        return self.decoder.decode(target_tokens(self.encode, view))


def target_tokens(encode: Encode, view: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
    """Return the tokens that a predictor is trained to predict: layer-normalised without parameters."""
    tokens = encode(view)
    return functional.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)


def build_arm(name: str, model: WorldModel, context: FinetuneContext[DecodeConfig]) -> DecoderArm:
    """Build a decoder, with the same initial weights on every rank, and the job that trains it."""
    settings, run = context.settings, context.model_config
    sizes = replace(settings.decoder, depth=0) if name == LINEAR else settings.decoder
    spec = PixelDecoderSpec(
        decoder=sizes,
        step=model.step,
        token_dim=run.model.encoder.dim,
        grid=run.grid,
        patch_size=run.model.encoder.patch_size,
        pixel_mean=run.data.pixel_mean,
        pixel_std=run.data.pixel_std,
    )
    decoder = build_pixel_decoder(spec, settings.seed)
    encoder = build_networks(model, settings, context.rank_info, name).encoder
    origin = describe_origin(model.step, encoder) | {f"decoder.{key}": value for key, value in asdict(sizes).items()}
    encode = freeze_encoder(encoder, context.rank_info)

    def prepare(batch: Batch) -> _Inputs:
        view = torch.cat([batch.source_view, batch.target_view])
        return _Inputs(tokens=target_tokens(encode, view), view=view)

    module = _OnTokens(decoder)
    job = Job(
        name=name,
        module=module,
        prepare=prepare,
        # Two views count as one image.
        loss=lambda decoded, inputs: (decoded - inputs.view).square().mean((1, 2, 3)).sum() / 2,
        optimizer=build_scaled_optimizer(module, context.run_config.optim, lambda parameter: 1.0),
        origin=origin,
    )
    return DecoderArm(decoder=decoder, encode=encode, job=job)
