"""Encoder and predictor as the one module that is trained."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwm_fast.config.run import RunConfig
from iwm_fast.kernels.attention.op import HEAD_DIMS
from iwm_fast.kernels.launch import architecture
from iwm_fast.kernels.ops import FUSED, REFERENCE, Ops
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.layers import initialize_
from iwm_fast.models.predictor import IdentityPredictor, Predictor, build_predictor
from iwm_fast.pipelines.batch import Batch, RaggedIndex
from iwm_fast.pipelines.config import check


class Prediction(NamedTuple):
    """What the trained networks say about a batch.

    A tuple and not a dataclass: DeepSpeed looks for the tensors to hook in tuples, lists and dicts only.
    """

    context_tokens: Float[Tensor, "C D"]
    """The encoder's, float32."""
    predicted_tokens: Float[Tensor, "M D"]
    """The predictor's, float32."""
    patches: RaggedIndex
    """The patches that were predicted: the context's for the identity predictor, otherwise the target's."""


class Student(nn.Module):
    """From a batch to a prediction: what an engine wraps."""

    def __init__(self, encoder: Encoder, predictor: Predictor | IdentityPredictor, autocast_dtype: torch.dtype | None):
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.autocast_dtype = autocast_dtype

    def forward(self, batch: Batch) -> Prediction:
        """Encode the context of the source view and predict."""
        is_mixed = self.autocast_dtype is not None
        with torch.autocast(batch.source_view.device.type, dtype=self.autocast_dtype, enabled=is_mixed):
            tokens = self.encoder(batch.source_view, batch.context)
            predicted = self.predictor(tokens, batch.action, batch.context, batch.target)
        patches = self.predictor.predicted_patches(batch.context, batch.target)
        # views: the prediction is computed from the encoder's tokens, and a gradient hook that an engine puts on each
        # output would act twice on a tensor that is an output and on the way to the other
        return Prediction(tokens.float().view_as(tokens), predicted.float().view_as(predicted), patches)


def compute_dtype(config: RunConfig) -> torch.dtype | None:
    """Return the dtype of the networks' products; None for plain float32."""
    return torch.bfloat16 if config.optim.precision == "bf16" else None


def choose_ops(config: RunConfig, device: torch.device) -> Ops:
    """Return the operations that the settings name.

    Raises:
        RuntimeError: if they are fused and `device` is no GPU (nor are kernels interpreted).
        ValueError: if they are fused and heads have a size no kernel is written for.
    """
    if config.runtime.ops == "reference":
        return REFERENCE
    architecture(device)
    model = config.model
    for name, part in (("encoder", model.encoder), ("predictor", model.predictor)):
        accepted = f"divide the width into heads of {' or '.join(map(str, HEAD_DIMS))} with runtime.ops=fused"
        is_built = part.depth > 0
        check(not is_built or part.dim // part.num_heads in HEAD_DIMS, f"model.{name}.num_heads", part.num_heads,
              f"{accepted} (model.{name}.dim is {part.dim})")  # fmt: skip
    return FUSED


def build_student(config: RunConfig, ops: Ops) -> Student:
    """Build encoder and predictor on the CPU; their weights follow from `config.seed` alone."""
    recompute = config.runtime.activation_checkpointing
    encoder = Encoder(config.model.encoder, config.views.size, ops, recompute=recompute)
    predictor = build_predictor(
        config.model.predictor,
        encoder_dim=config.model.encoder.dim,
        grid=config.grid,
        num_actions=len(config.views.entries),
        ops=ops,
        recompute=recompute,
    )
    generator = torch.Generator().manual_seed(config.seed)
    initialize_(encoder, generator)
    initialize_(predictor, generator)
    if isinstance(predictor, Predictor) and predictor.mixer is not None:
        predictor.mixer.initialize_(generator)
    return Student(encoder, predictor, compute_dtype(config))
