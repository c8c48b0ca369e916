"""Providers: implementations that are compared, each a differentiable function with its inputs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.records import BACKWARD, FORWARD
from benchmarks.harness.timing import TimedFunction

Function = Callable[..., Tensor | Sequence[Tensor]]


class Provider(NamedTuple):
    """One implementation of an operation."""

    name: str
    function: Function
    inputs: tuple[Tensor, ...]
    """Arguments of the function; all require a gradient."""
    d_outputs: tuple[Tensor, ...]
    """Gradient of each output."""

    def outputs(self) -> tuple[Tensor, ...]:
        """Run the forward pass as in training, saving what the backward pass needs."""
        result = self.function(*self.inputs)
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the backward pass once and return the gradients; nothing is accumulated in `grad`."""
        return torch.autograd.grad(outputs, self.inputs, self.d_outputs)

    def outputs_and_gradients(self) -> list[Tensor]:
        """Return the detached outputs, followed by the gradients of the inputs."""
        outputs = self.outputs()
        return [tensor.detach() for tensor in outputs] + list(self.gradients(outputs))

    def timed_pass(self, pass_: str) -> TimedFunction:
        """Return one of PASSES to time; a backward pass gets a fresh, untimed forward, as no graph is retained."""
        if pass_ == BACKWARD:
            return TimedFunction(self.gradients, self.outputs)
        return TimedFunction(lambda _: self.outputs() if pass_ == FORWARD else self.gradients(self.outputs()))

    def in_float64(self, function: Function) -> "Provider":
        """Return a function on the same values in float64, from which errors are measured."""
        inputs = tuple(tensor.detach().double().requires_grad_() for tensor in self.inputs)
        return Provider("float64", function, inputs, tuple(tensor.double() for tensor in self.d_outputs))


def random_leaf(*shape: int, device: str, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Return a tensor of normal random numbers that requires a gradient."""
    return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()
