"""The engine protocol: what an optimiser step consists of, whether PyTorch or DeepSpeed makes it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of one optimiser step, equal on all ranks."""

    applied: bool
    """Whether weights and moments changed. They do not if a loss or gradient was not finite on at least one rank, or if
    the square of the gradient norm is beyond float32, as Adam's second moments would be."""
    grad_norm: float | Tensor
    """Global gradient norm before clipping; infinite if the step was not applied. Converting a tensor, which is scalar,
    to a number waits for the device to finish the step."""


@runtime_checkable
class Engine(Protocol):
    """The owner of the trained module and its optimiser.

    One optimiser step consists of `forward` and `backward` for each micro-batch, then `step`. Gradients are summed over
    micro-batches and ranks, never averaged, because the loss is already divided by the global number of targets.
    """

    def forward(self, batch: Any) -> Any:
        """Run the module on one micro-batch. Collective with ZeRO stage 3: every rank must call it."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch's share of the loss. Collective: every rank must call it."""
        ...

    def step(self) -> StepOutcome:
        """Clip the gradients, update the weights and clear the gradients; call it after the last micro-batch.

        If a loss or gradient is not finite on at least one rank, no rank changes its weights or moments. Collective:
        every rank must call it.

        Raises:
            RuntimeError: if `backward` was not called once for each micro-batch of the step.
        """
        ...

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield name and unsharded float32 weight of the parameters whose names begin with the prefix.

        The tensors are valid until the next step; copy them to keep their values. Collective: every rank must call it.
        """
        ...

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        """Set learning rate and weight decay for the next step; weight decay applies to decaying groups only."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return a copy of weights and moments on the CPU, by name; empty on ranks other than 0.

        The format, described in `iwm_fast.engines.portable_state`, does not depend on the engine. Collective: every
        rank must call it.
        """
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load an unsharded state, which every rank must pass in full.

        Raises:
            ValueError: if its names or shapes differ from this model's.
        """
        ...

    def release(self) -> None:
        """Detach the module from the engine and leave it usable, with unsharded weights on every rank.

        ZeRO stage 3 replaces its parameters by new objects. Collective: every rank must call it.
        """
        ...
