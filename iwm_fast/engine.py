"""Backward, clip, step: the engine protocol, its plain implementation, and the choice between that and DeepSpeed."""

import math
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from iwm_fast.config import RunConfig, accumulation_steps
from iwm_fast.distributed import Place, copy_from_rank_zero
from iwm_fast.engine_state import (
    StepOutcome,
    WholeState,
    check_num_backwards,
    check_optimizer,
    finish_gradient,
    poison_unless_finite,
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

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        """Yield the module's whole float32 weights under its own names, those that begin with the prefix; collective.

        They are those of this moment: take them before the next step.
        """
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

    def release(self) -> None:
        """Give the module back with whole weights on every rank, for use without the engine, which ends; collective.

        With ZeRO stage 3 its parameters are new objects.
        """
        ...


def build_engine(config: RunConfig, module: nn.Module, optimizer: Optimizer, place: Place) -> Engine:
    """Return the engine that `runtime.engine` names; moves the module to its device and starts all ranks from rank 0.

    Raises:
        ValueError: if module and optimiser do not fit the engines, or `runtime.deepspeed` contradicts other settings.
    """
    module.to(place.device)
    check_optimizer(optimizer, module.named_parameters())
    for parameter in module.parameters():
        copy_from_rank_zero(parameter)
    kind = DeepSpeedEngine if config.runtime.engine == "deepspeed" else PlainEngine
    return kind(config, module, optimizer, place)


class PlainEngine:
    """The plain twin of DeepSpeedEngine: PyTorch alone, with DistributedDataParallel where there are several ranks."""

    def __init__(self, config: RunConfig, module: nn.Module, optimizer: Optimizer, place: Place) -> None:
        self._optimizer, self._clip_norm = optimizer, config.optim.clip_norm
        self._accumulation = accumulation_steps(config, place.world_size)[1]
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._state = WholeState(module, optimizer, place.rank)
        self._num_backwards = 0
        self._module = _in_parallel(module) if place.world_size > 1 else module

    def forward(self, batch: Any) -> Any:
        is_last = self._num_backwards == self._accumulation - 1
        if isinstance(self._module, DistributedDataParallel) and not is_last:
            # gradients stay here until the last micro-batch
            with self._module.no_sync():
                return self._module(batch)
        return self._module(batch)

    def backward(self, loss: Tensor) -> None:
        self._num_backwards += 1
        poison_unless_finite(loss).backward()

    def step(self) -> StepOutcome:
        check_num_backwards(self._num_backwards, self._accumulation)
        self._num_backwards = 0
        # the summed gradient has the same bits on every rank, so all decide alike
        norm = finish_gradient(self._trained, self._clip_norm)
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return StepOutcome(applied=math.isfinite(norm), grad_norm=norm)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        return self._state.named_parameters(prefix)

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        set_hyperparameters(self._optimizer, lr, weight_decay)

    def state(self) -> dict[str, Tensor]:
        return self._state.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._state.load_state(state)

    def release(self) -> None:
        # it has hooks on the parameters
        if isinstance(self._module, DistributedDataParallel):
            self._module = self._module.module


def _in_parallel(module: nn.Module) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, _sum_bucket)
    return wrapped


def _sum_bucket(
    _: None,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[Tensor]:
    """Sum over ranks, where DistributedDataParallel would take the mean."""
    summing = dist.all_reduce(bucket.buffer(), async_op=True)
    assert summing is not None
    return summing.get_future().then(lambda future: future.value()[0])
