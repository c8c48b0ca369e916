"""The operations that models are built from, as one tuple: a model takes either `REFERENCE` or `FUSED`."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from iwm_fast.kernels import residual_norm as norm
from iwm_fast.kernels.attention import op as attention
from iwm_fast.kernels.attention.reference import ragged_attention_reference
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.predictor_input import op as predictor_inputs


class Ops(NamedTuple):
    """One implementation of the operations; a fused function has the same signature as its reference."""

    ragged_attention: Callable[[Tensor, Sequences], Tensor]
    """(qkv, sequences) -> out; explained in `iwm_fast.kernels.attention.op`."""
    predictor_input: Callable[..., Tensor]
    """(context, mask_token, positions, patches, layout, *, action_tokens, mixer) -> packed; explained in
    `iwm_fast.kernels.predictor_input.op`."""
    residual_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(x, residual, weight, bias, eps) -> (sum, normed); explained in `iwm_fast.kernels.residual_norm`."""


REFERENCE = Ops(ragged_attention_reference, predictor_inputs.predictor_input_reference, norm.residual_norm_reference)
"""PyTorch: runs on any device, and is what the fused operations are tested against."""

FUSED = Ops(attention.ragged_attention, predictor_inputs.predictor_input, norm.residual_norm)
"""Triton kernels: run on NVIDIA GPUs and, slowly, in Triton's interpreter."""
