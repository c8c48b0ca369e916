"""What every engine does with gradients between the last backward pass and the optimiser's update."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def propagate_nonfinite_loss(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the loss, with NaN gradients if it is not finite.

    So one look at the summed gradients' norm covers losses and gradients of every rank, without a device sync.
    """
    # 0 * inf and 0 * NaN are NaN; a finite loss is multiplied by exactly 1
    return loss * (loss.detach() * 0 + 1)


def check_num_backwards(found: int, wanted: int) -> None:
    """Check that a step follows all of its micro-batches.

    Raises:
        RuntimeError: if it does not.
    """
    if found != wanted:
        raise RuntimeError(f"step() after {found} micro-batches; it must follow {wanted}")


def clip_gradients(parameters: Sequence[nn.Parameter], clip_norm: float | None) -> float:
    """Clip gradients in place and return their norm before, infinite if one is not finite: they must not be used then.

    A parameter that no loss reached counts as zero, as in ZeRO, and keeps being decayed.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    value = float(norm)
    if not math.isfinite(value):
        return math.inf
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return value
