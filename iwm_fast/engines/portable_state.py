"""The training state that all engines share, by parameter name and independent of ranks and ZeRO stages.

It is a flat dictionary of float32 CPU tensors: `weight/<name>` for every parameter, `exp_avg/<name>` and
`exp_avg_sq/<name>` (Adam's moments) for every trained one, and `adam_step`, a scalar.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")


def copy_to_cpu(tensor: Tensor) -> Tensor:
    """Return a contiguous copy on the CPU, without gradient."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def count_adam_steps(optimizer: Optimizer) -> int:
    """Return the number of updates that Adam has made, which must be the same for all parameters."""
    counts = {int(state["step"]) for state in optimizer.state.values() if state}
    assert len(counts) <= 1, f"all parameters must have been updated equally often, got {counts}"
    return counts.pop() if counts else 0


def get_moment(optimizer: Optimizer, parameter: Tensor, moment: str) -> Tensor:
    """Return one of Adam's moments of a parameter; zero before the first update."""
    state = optimizer.state.get(parameter)
    return state[moment] if state else torch.zeros_like(parameter, requires_grad=False)


def set_moments(optimizer: Optimizer, parameter: Tensor, steps: int, moments: dict[str, Tensor]) -> None:
    """Overwrite Adam's state of a parameter with copies of the moments and the number of updates they result from."""
    # The fused and capturable implementations read the counter on the device, the others on the CPU.
    is_on_device = bool(optimizer.defaults.get("fused")) or bool(optimizer.defaults.get("capturable"))
    counter = torch.tensor(float(steps), device=parameter.device if is_on_device else "cpu")
    copies = {name: torch.empty_like(parameter, requires_grad=False).copy_(moments[name]) for name in MOMENTS}
    optimizer.state[parameter] = {"step": counter, **copies}


def check_state(state: dict[str, Tensor], named_parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Check that a state has the names and shapes of a model.

    Raises:
        ValueError: naming the first tensor that is missing, unexpected or of another shape.
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
    unexpected = [name for name in state if name not in expected]
    if unexpected:
        raise ValueError(f"the saved state has {unexpected[0]}, which this model does not have")


def parameters_with_prefix(module: nn.Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters whose names begin with a prefix, under their full names."""
    return ((name, parameter) for name, parameter in module.named_parameters() if name.startswith(prefix))


class ReplicatedState:
    """The state of an engine in which every rank holds all weights, gradients and moments."""

    def __init__(self, module: nn.Module, optimizer: Optimizer, rank: int) -> None:
        self._module = module
        self._optimizer = optimizer
        self._rank = rank

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield name and weight of the parameters whose names begin with the prefix."""
        return parameters_with_prefix(self._module, prefix)

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the portable state on the CPU; empty on ranks other than 0."""
        if self._rank != 0:
            return {}
        state = {"adam_step": torch.tensor(float(count_adam_steps(self._optimizer)))}
        for name, parameter in self._module.named_parameters():
            state[f"weight/{name}"] = copy_to_cpu(parameter)
            for moment in MOMENTS if parameter.requires_grad else ():
                state[f"{moment}/{name}"] = copy_to_cpu(get_moment(self._optimizer, parameter, moment))
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        """Overwrite weights and moments in place with those of a portable state.

        Raises:
            ValueError: if its names or shapes differ from this model's.
        """
        check_state(state, self._module.named_parameters())
        for name, parameter in self._module.named_parameters():
            parameter.copy_(state[f"weight/{name}"])
            if parameter.requires_grad:
                moments = {moment: state[f"{moment}/{name}"] for moment in MOMENTS}
                set_moments(self._optimizer, parameter, int(state["adam_step"]), moments)
