"""The engine protocol: backward, clip, step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True)
class StepOutcome:
    """What one optimiser step did; the same on every rank."""

    applied: bool
    """False: a loss or gradient was not finite on some rank, and neither weights nor moments changed."""
    grad_norm: float
    """Global gradient norm before clipping; infinite if the step was not applied."""


@runtime_checkable
class Engine(Protocol):
    """Owns the trained module and its optimiser; one optimiser step is several forward and backward, then one step.

    Gradients are summed over micro-batches and ranks, never averaged: the loss has been divided already.
    """

    def forward(self, batch: Any) -> Any:
        """Run the module on one micro-batch."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this micro-batch's share of the loss."""
        ...

    def step(self) -> StepOutcome:
        """Clip, update and clear the gradients, once after the last micro-batch; collective.

        If a loss or a gradient was not finite on any rank, no rank changes weights or moments.

        Raises:
            RuntimeError: if it does not follow the run's number of micro-batches.
        """
        ...

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield the module's unsharded float32 weights whose names begin with the prefix; collective.

        They are those of this moment: take them before the next step.
        """
        ...

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        """Set both for the next step; weight decay only in groups that decay."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return weights and moments by name, copied to the CPU (see portable_state); collective, {} on ranks > 0."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Load an unsharded state, which every rank passes.

        Raises:
            ValueError: if its names or shapes are not this model's.
        """
        ...

    def release(self) -> None:
        """Leave the module usable without the engine, with unsharded weights on every rank; collective.

        With ZeRO stage 3 its parameters are new objects.
        """
        ...
