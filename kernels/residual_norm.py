"""Residual addition followed by LayerNorm.

    sum = x + residual;  normed = (sum - mean(sum)) / sqrt(var(sum) + eps) * weight + bias, over the last axis

Shapes: x, residual (M, D); weight, bias (D,); results (M, D) twice. Precision: the sum has the wider dtype of the two
(a bfloat16 update leaves a float32 residual stream in float32); statistics in float32, for float64 in float64.
Gradient: that of the formula, from autograd.
"""

import torch.nn.functional as F
from torch import Tensor


def residual_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Return (x + residual, its LayerNorm).

    Args:
        x: (M, D), what a block adds.
        residual: (M, D), the stream it is added to.
        weight: (D,).
        bias: (D,).
        eps: added to the variance.
    """
    total = x + residual
    return total, F.layer_norm(total, (total.shape[-1],), weight, bias, eps)
