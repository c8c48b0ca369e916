"""The operations a model is built from, as one tuple: choosing a set of them is choosing one of these."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from kernels.predictor_input import predictor_input_reference
from kernels.ragged_attention import ragged_attention_reference
from kernels.residual_norm import residual_norm_reference


class Ops(NamedTuple):
    """Functions of the same signature as their references."""

    ragged_attention: Callable[[Tensor, Tensor | None, int], Tensor]
    """(qkv, offsets, longest) -> out; see `kernels.ragged_attention`."""
    predictor_input: Callable[[Tensor, Tensor, Tensor | None, Tensor, Tensor], Tensor]
    """(context, targets, action_tokens, context_offsets, target_offsets) -> packed; see `kernels.predictor_input`."""
    residual_norm: Callable[[Tensor, Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]
    """(x, residual, weight, bias, eps) -> (sum, normed); see `kernels.residual_norm`."""


REFERENCE = Ops(ragged_attention_reference, predictor_input_reference, residual_norm_reference)
"""Plain PyTorch: runs anywhere, and is what the fused operations are tested against."""
