"""Who is compared: a differentiable function on inputs of its own, and the passes over it that are timed."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.records import BACKWARD, BOTH, FORWARD
from benchmarks.harness.timing import Work

Function = Callable[..., Tensor | Sequence[Tensor]]


class Provider(NamedTuple):
    """One of several that do the same."""

    name: str
    function: Function
    inputs: tuple[Tensor, ...]
    """What is passed, all of which want a gradient."""
    d_outputs: tuple[Tensor, ...]
    """The gradient that comes back for each output."""

    def outputs(self) -> tuple[Tensor, ...]:
        """Run forward as in training, keeping what the backward pass needs."""
        found = self.function(*self.inputs)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    def gradients(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run backward, once; nothing is added to what was there before."""
        return torch.autograd.grad(outputs, self.inputs, self.d_outputs)

    def outputs_and_gradients(self) -> list[Tensor]:
        """Return both."""
        outputs = self.outputs()
        return [tensor.detach() for tensor in outputs] + list(self.gradients(outputs))

    def work(self, pass_: str) -> Work:
        """Return a pass to time. Backward has a fresh forward before it: no graph is kept, as in training."""
        works: dict[str, Work] = {
            FORWARD: Work(lambda _: self.outputs()),
            BACKWARD: Work(self.gradients, self.outputs),
            BOTH: Work(lambda _: self.gradients(self.outputs())),
        }
        return works[pass_]

    def at(self, inputs: Sequence[Tensor], d_outputs: Sequence[Tensor]) -> "Provider":
        """Return the same function on other tensors, detached."""
        leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
        return self._replace(inputs=leaves, d_outputs=tuple(d_outputs))

    def in_double(self, function: Function) -> "Provider":
        """Return a function in float64 on the same values: what errors are measured from."""
        exact = self.at([tensor.double() for tensor in self.inputs], [tensor.double() for tensor in self.d_outputs])
        return exact._replace(name="float64", function=function)


def compiled(function: Any) -> Any:
    """Return a function through torch.compile in its default mode, each shape on its own."""
    return torch.compile(function, dynamic=False)


def leaf(*shape: int, device: str, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    """Draw normal numbers; they want a gradient."""
    return (scale * torch.randn(shape, device=device)).to(dtype).requires_grad_()
