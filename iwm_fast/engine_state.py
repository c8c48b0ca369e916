"""What every engine shares: its state by parameter name, what a step reports, what it does with a bad loss or gradient.

The portable state of a training run is a flat dict of float32 CPU tensors: `weight/<name>` for every parameter,
`exp_avg/<name>` and `exp_avg_sq/<name>` (Adam's moments) for every trained one, and `adam_step`, a scalar.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
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


def check_num_backwards(found: int, wanted: int) -> None:
    """Check that a step follows all of its micro-batches.

    Raises:
        RuntimeError: if it does not.
    """
    if found != wanted:
        raise RuntimeError(f"step() after {found} micro-batches; it must follow {wanted}")


def finish_gradient(parameters: Sequence[nn.Parameter], clip_norm: float | None) -> float:
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
    # torch keeps the counter where its kernels read it
    is_on_device = bool(optimizer.defaults.get("fused")) or bool(optimizer.defaults.get("capturable"))
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


class WholeState:
    """The state where every rank holds whole weights, gradients and moments."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, rank: int) -> None:
        self._module, self._optimizer, self._rank = module, optimizer, rank

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """See `iwm_fast.engine.Engine`, as for the others."""
        for name, parameter in self._module.named_parameters():
            if name.startswith(prefix):
                yield name, parameter

    def state(self) -> dict[str, Tensor]:
        if self._rank != 0:
            return {}
        state = {"adam_step": torch.tensor(float(adam_steps(self._optimizer)))}
        for name, parameter in self._module.named_parameters():
            state[f"weight/{name}"] = copy_to_host(parameter)
            for moment in MOMENTS if parameter.requires_grad else ():
                state[f"{moment}/{name}"] = copy_to_host(get_moment(self._optimizer, parameter, moment))
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        check_state(state, self._module.named_parameters())
        for name, parameter in self._module.named_parameters():
            parameter.copy_(state[f"weight/{name}"])
            if parameter.requires_grad:
                moments = {moment: state[f"{moment}/{name}"] for moment in MOMENTS}
                set_moments(self._optimizer, parameter, int(state["adam_step"]), moments)
