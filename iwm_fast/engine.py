"""Backward, clip, step: the engine protocol, its plain implementation, and the choice between that and DeepSpeed."""

import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from iwm_fast.config import RunConfig, accumulation_steps
from iwm_fast.distributed import Place, copy_from_rank_zero, sum_over_ranks
from iwm_fast.engine_state import (
    MOMENTS,
    StepOutcome,
    adam_steps,
    check_optimizer,
    check_state,
    copy_to_host,
    get_moment,
    poison_unless_finite,
    set_moments,
)
from iwm_fast.optim import set_hyperparameters
from iwm_fast.zero_engine import DeepSpeedEngine


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

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the module's whole float32 weights under its own names."""
        ...

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        """Set both for the next step; weight decay only in groups that decay."""
        ...

    def state(self) -> dict[str, Tensor]:
        """Return weights and moments by name, copied to the CPU (see engine_state); collective, empty on ranks > 0."""
        ...

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Take over a whole state, which every rank passes.

        Raises:
            ValueError: if its names or shapes are not this model's.
        """
        ...


def build_engine(config: RunConfig, module: nn.Module, optimizer: Optimizer, place: Place) -> Engine:
    """Return the engine that `runtime.engine` names; moves the module to its device and starts all ranks from rank 0.

    Raises:
        ValueError: if module and optimiser do not fit the engines, or `runtime.deepspeed` contradicts other settings.
    """
    module.to(place.device)
    check_optimizer(optimizer, module.named_parameters())
    if config.runtime.engine == "deepspeed":
        return DeepSpeedEngine(config, module, optimizer, place)
    return PlainEngine(config, module, optimizer, place)


class PlainEngine:
    """The plain twin of DeepSpeedEngine: every rank holds everything; see `Engine`."""

    def __init__(self, config: RunConfig, module: nn.Module, optimizer: Optimizer, place: Place) -> None:
        self._module, self._optimizer, self._rank = module, optimizer, place.rank
        self._clip_norm = math.inf if config.optim.clip_norm is None else config.optim.clip_norm
        self._accumulation = accumulation_steps(config, place.world_size)[1]
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._num_backwards = 0
        for parameter in module.parameters():
            copy_from_rank_zero(parameter)

    def forward(self, batch: Any) -> Any:
        return self._module(batch)

    def backward(self, loss: Tensor) -> None:
        self._num_backwards += 1
        poison_unless_finite(loss).backward()

    def step(self) -> StepOutcome:
        if self._num_backwards != self._accumulation:
            raise RuntimeError(f"step() after {self._num_backwards} micro-batches; it must follow {self._accumulation}")
        self._num_backwards = 0
        gradient = self._summed_gradient()
        norm = float(torch.linalg.vector_norm(gradient, dtype=torch.float64))
        # the summed gradient has the same bits on every rank, so all decide alike
        is_applied = math.isfinite(norm)
        if is_applied:
            self._put_gradient(gradient * min(1.0, self._clip_norm / (norm + 1e-6)))
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepOutcome(applied=is_applied, grad_norm=norm if is_applied else math.inf)

    def _summed_gradient(self) -> Float[Tensor, "parameters"]:
        # a parameter that no loss reached counts as zero, as in ZeRO, and keeps being decayed
        pieces = [torch.zeros_like(row) if row.grad is None else row.grad for row in self._trained]
        return sum_over_ranks(torch.cat([piece.flatten() for piece in pieces]))

    def _put_gradient(self, gradient: Float[Tensor, "parameters"]) -> None:
        pieces = gradient.split([parameter.numel() for parameter in self._trained])
        for parameter, piece in zip(self._trained, pieces, strict=True):
            parameter.grad = piece.view_as(parameter)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._module.named_parameters()

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        set_hyperparameters(self._optimizer, lr, weight_decay)

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
