"""The student: encoder and predictor as a single module, which is what an engine trains."""

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
from iwm_fast.pipelines.config import require


class Prediction(NamedTuple):
    """The student's output for a batch.

    It is a tuple because DeepSpeed searches only tuples, lists and dictionaries for tensors to put its hooks on; it
    would not find them in a dataclass.
    """

    context_tokens: Float[Tensor, "C D"]
    """The encoder's tokens of the context patches, float32."""
    predicted_tokens: Float[Tensor, "M D"]
    """The predictor's tokens of `patches`, float32."""
    patches: RaggedIndex
    """The predicted patches: the context patches for the identity predictor, otherwise the target patches."""


class Student(nn.Module):
    """Encoder and predictor, from a batch to a prediction."""

    def __init__(self, encoder: Encoder, predictor: Predictor | IdentityPredictor, autocast_dtype: torch.dtype | None):
        super().__init__()
        self.encoder: Encoder = encoder
        self.predictor: Predictor | IdentityPredictor = predictor
        self.autocast_dtype: torch.dtype | None = autocast_dtype
        """Dtype of matrix products under autocast; None for float32 without autocast."""

    def forward(self, batch: Batch) -> Prediction:
        """Encode the context patches of the source view and predict the target patches of the target view."""
        is_mixed = self.autocast_dtype is not None
        with torch.autocast(batch.source_view.device.type, dtype=self.autocast_dtype, enabled=is_mixed):
            tokens = self.encoder(batch.source_view, batch.context)
            predicted = self.predictor(tokens, batch.action, batch.context, batch.target)
        patches = self.predictor.predicted_patches(batch.context, batch.target)
        # DeepSpeed puts a hook that scales the gradient on each output. The prediction is computed from the encoder's
        # tokens, so without views these would be both an output and an intermediate of the other output, and the hook
        # would also scale the gradient that comes from the prediction, a second time.
        return Prediction(tokens.float().view_as(tokens), predicted.float().view_as(predicted), patches)


def compute_dtype(config: RunConfig) -> torch.dtype | None:
    """Return the dtype of the networks' matrix products under autocast; None for float32 without autocast."""
    return torch.bfloat16 if config.optim.precision == "bf16" else None


def choose_ops(config: RunConfig, device: torch.device) -> Ops:
    """Return the implementations of the networks' operations that `runtime.ops` selects.

    Raises:
        RuntimeError: if they are fused, `device` is not a GPU and kernels are not interpreted.
        ValueError: if they are fused and there is no kernel for the size of the attention heads.
    """
    if config.runtime.ops == "reference":
        return REFERENCE
    # Raises if fused operations cannot run on this device.
    architecture(device)
    model = config.model
    for name, network in (("encoder", model.encoder), ("predictor", model.predictor)):
        accepted = f"divide the width into heads of {' or '.join(map(str, HEAD_DIMS))} with runtime.ops=fused"
        is_built = network.depth > 0
        is_supported = network.dim // network.num_heads in HEAD_DIMS
        require(not is_built or is_supported, f"model.{name}.num_heads", network.num_heads,
              f"{accepted} (model.{name}.dim is {network.dim})")  # fmt: skip
    return FUSED


def build_student(config: RunConfig, ops: Ops) -> Student:
    """Build encoder and predictor on the CPU, with initial weights that depend on `config.seed` only."""
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
    # One generator, in this order: changing the order would change the initial weights of every seed.
    generator = torch.Generator().manual_seed(config.seed)
    initialize_(encoder, generator)
    initialize_(predictor, generator)
    if isinstance(predictor, Predictor) and predictor.mixer is not None:
        predictor.mixer.initialize_(generator)
    return Student(encoder, predictor, compute_dtype(config))
