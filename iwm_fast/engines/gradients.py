"""What every engine does with losses and gradients between the backward pass and the optimiser's update."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def propagate_nonfinite_loss(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the loss, with NaN gradients if it is not finite.

    The norm of the summed gradients then reveals nonfinite losses and gradients of all ranks at once, so that the loss
    itself need not be copied to the host.
    """
    # An infinite constant in the loss would leave its gradients finite. 0 * inf and 0 * NaN are NaN, and a finite loss
    # is multiplied by exactly 1.
    return loss * (loss.detach() * 0 + 1)


def check_num_backwards(actual: int, expected: int) -> None:
    """Check that a step follows all of its micro-batches.

    Raises:
        RuntimeError: if the numbers differ.
    """
    if actual != expected:
        raise RuntimeError(f"step() was called after {actual} micro-batches, but must be called after {expected}")


def clip_gradients(parameters: Sequence[nn.Parameter], clip_norm: float | None) -> float:
    """Clip the global norm of the gradients in place and return the norm before clipping.

    A parameter without a gradient gets a gradient of zero, as in ZeRO, so that its weight decay does not depend on the
    engine.

    Args:
        parameters: the trained parameters; their gradients must already be summed over ranks.
        clip_norm: the largest norm; None for no clipping.

    Returns:
        The norm, which is infinite if a gradient is not finite. The gradients are then left as they are and must not be
        used.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    # This waits for the device. The decision to skip a step is made on the host, where the step count is kept.
    value = float(norm)
    if not math.isfinite(value):
        return math.inf
    if clip_norm is not None:
        nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
    return value
