"""What every engine shares: its state by parameter name, what a step reports, what it does with a bad loss or gradient.

The portable state of a training run is a flat dict of float32 CPU tensors: `weight/<name>` for every parameter,
`exp_avg/<name>` and `exp_avg_sq/<name>` (Adam's moments) for every trained one, and `adam_step`, a scalar.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


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


def parameters_with_prefix(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters whose names begin with a prefix, under their whole names."""
    return ((name, parameter) for name, parameter in module.named_parameters() if name.startswith(prefix))


class ReplicatedState:
    """The state where every rank holds whole weights, gradients and moments."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, rank: int) -> None:
        self._module, self._optimizer, self._rank = module, optimizer, rank

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """See `iwm_fast.engines.base.Engine`, as for the others."""
        return parameters_with_prefix(self._module, prefix)

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
