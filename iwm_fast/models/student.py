"""The student: encoder and predictor as a single module, which is what an engine trains."""

import logging
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from iwm_fast.config.run import RunConfig
from iwm_fast.kernels import residual_norm
from iwm_fast.kernels.attention import op as attention
from iwm_fast.kernels.launch import IS_INTERPRETING, architecture, why_not_launchable
from iwm_fast.kernels.ops import FUSED, REFERENCE, Ops
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.layers import initialize_
from iwm_fast.models.predictor import IdentityPredictor, Predictor, build_predictor
from iwm_fast.pipelines.batch import Batch, RaggedIndex

log = logging.getLogger(__name__)


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


def choose_ops(config: RunConfig, device: torch.device, *, num_predictor_tokens: int | None = None) -> Ops:
    """Return the implementations of the networks' operations that `runtime.ops` selects, and log the choice.

    A warning is logged if the networks compute in bf16 on a CPU on which that is slow.

    Args:
        config: settings of the networks.
        device: the device that they compute on.
        num_predictor_tokens: length of the predictor's longest sequence. None for pretraining, where context and
            target patches of an image do not overlap.

    Raises:
        ValueError: if they are fused and there are no kernels for the device or the networks.
    """
    if compute_dtype(config) == torch.bfloat16 and device.type == "cpu" and not _has_fast_bf16():
        log.warning(
            "this CPU has no fast bf16 products; set optim.precision=fp32 for training, tune.precision=fp32 for "
            "evaluations, which is many times as fast here"
        )
    setting = config.runtime.ops
    if setting == "reference":
        return REFERENCE
    reason = _why_not_fused(config, device, num_predictor_tokens)
    # In the interpreter kernels run on a CPU, slowly. That has to be asked for.
    if setting == "auto" and device.type != "cuda":
        reason = "there is no GPU"
    if setting == "fused" and reason:
        raise ValueError(f"runtime.ops=fused cannot be used: {reason}; set runtime.ops=reference")
    log.info("operations are %s", f"those of PyTorch: {reason}" if reason else "fused Triton kernels")
    return REFERENCE if reason else FUSED


def _has_fast_bf16() -> bool:
    """Return whether PyTorch's bf16 products on this CPU are those of oneDNN, which needs AVX-512 or Arm's bf16."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _why_not_fused(config: RunConfig, device: torch.device, num_predictor_tokens: int | None) -> str:
    """Return why fused operations cannot compute these networks; empty if they can."""
    if device.type != "cuda" and not IS_INTERPRETING:
        return f"fused operations run on NVIDIA GPUs, got device {str(device)!r}"
    gpu, dtype = architecture(device), compute_dtype(config) or torch.float32
    if gpu < 80:
        return f"fused operations need a GPU of compute capability 8.0 or newer, got {gpu / 10}"
    if device.type == "cuda" and (reason := why_not_launchable()):
        return reason
    encoder, predictor, num_patches = config.model.encoder, config.model.predictor, config.grid**2
    num_action_tokens = len(config.views.entries) if predictor.conditioning == "sequence" else 0
    lengths = {"encoder": num_patches, "predictor": num_predictor_tokens or num_patches + num_action_tokens}
    for name, network in (("encoder", encoder), ("predictor", predictor)):
        if network.depth == 0:
            continue
        head_dim = network.dim // network.num_heads
        for operation, reason in (
            ("attention", attention.why_unsupported(gpu, head_dim, dtype, lengths[name])),
            ("residual_norm", residual_norm.why_unsupported(network.dim)),
        ):
            if reason:
                return f"in model.{name}, fused {operation} {reason}"
    return ""


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
