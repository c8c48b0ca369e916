"""What every engine shares: its state by parameter name, what a step reports, what it does with a bad loss.

The portable state of a training run is a flat dict of float32 CPU tensors: `weight/<name>` for every parameter,
`exp_avg/<name>` and `exp_avg_sq/<name>` (Adam's moments) for every trained one, and `adam_step`, a scalar.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepOutcome:
    """What one optimiser step did; the same on every rank."""

    applied: bool
    """False: a loss or gradient was not finite on some rank, and neither weights nor moments changed."""
    grad_norm: float
    """Global gradient norm before clipping; infinite if the step was not applied."""


def check_optimizer(optimizer: Optimizer, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check what the engines rely on.

    Raises:
        ValueError: if the optimiser does not hold exactly the trainable parameters, or one is not float32.
    """
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in named_parameters:
        if parameter.requires_grad != (id(parameter) in held):
            raise ValueError(
                f"parameter {name} must be in the optimizer exactly if it is trainable; see build_optimizer"
            )
        if parameter.dtype != torch.float32:
            raise ValueError(
                f"parameter {name} must be float32, got {parameter.dtype}; use autocast in forward instead"
            )


def poison_unless_finite(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """Return the loss, with NaN gradients if it is not finite.

    So one look at the summed gradients' norm covers losses and gradients of every rank, without a device sync.
    """
    # 0 * inf and 0 * NaN are NaN; a finite loss is multiplied by exactly 1
    return loss * (loss.detach() * 0 + 1)


def copy_to_host(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def adam_steps(optimizer: Optimizer) -> int:
    """Return how many updates Adam has made."""
    counts = {int(state["step"]) for state in optimizer.state.values() if state}
    assert len(counts) <= 1, f"all parameters are updated together, got {counts}"
    return counts.pop() if counts else 0


def get_moment(optimizer: Optimizer, parameter: Tensor, moment: str) -> Tensor:
    """Return one of Adam's moments, zero before the first update."""
    state = optimizer.state.get(parameter)
    return state[moment] if state else torch.zeros_like(parameter, requires_grad=False)


def set_moments(optimizer: Optimizer, parameter: Tensor, steps: int, moments: dict[str, Tensor]) -> None:
    """Give a parameter of the optimiser a copy of the moments, and the number of updates they come from."""
    group = next(row for row in optimizer.param_groups if any(parameter is held for held in row["params"]))
    # torch keeps the counter where its kernels read it
    is_on_device = bool(group.get("fused")) or bool(group.get("capturable"))
    counter = torch.tensor(float(steps), device=parameter.device if is_on_device else "cpu")
    copies = {name: torch.empty_like(parameter, requires_grad=False).copy_(moments[name]) for name in MOMENTS}
    optimizer.state[parameter] = {"step": counter, **copies}


def check_state(state: dict[str, Tensor], named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check that a state has the names and shapes of this model.

    Raises:
        ValueError: naming the first tensor that is missing, superfluous or of another shape.
    """
    expected = {"adam_step": ()}
    for name, parameter in named_parameters:
        kinds = ("weight", *MOMENTS) if parameter.requires_grad else ("weight",)
        expected |= {f"{kind}/{name}": tuple(parameter.shape) for kind in kinds}
    for name, shape in expected.items():
        if name not in state:
            raise ValueError(f"the saved state has no {name}, which this model needs with shape {shape}")
        if tuple(state[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(state[name].shape)} in the saved state, {shape} in this model")
    superfluous = [name for name in state if name not in expected]
    if superfluous:
        raise ValueError(f"the saved state has {superfluous[0]}, which this model does not have")
