"""The PyTorch engine: the plain twin of the DeepSpeed engine."""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from iwm_fast.config.batch_size import accumulation_steps
from iwm_fast.config.run import RunConfig
from iwm_fast.engines.base import StepOutcome
from iwm_fast.engines.gradients import check_num_backwards, clip_gradients, propagate_nonfinite_loss
from iwm_fast.engines.optimizer import set_hyperparameters
from iwm_fast.engines.portable_state import ReplicatedState
from iwm_fast.runtime.distributed import RankInfo


class TorchEngine:
    """An engine of PyTorch alone, with DistributedDataParallel if there are several ranks.

    Its methods are those of `iwm_fast.engines.base.Engine`.
    """

    def __init__(self, config: RunConfig, module: nn.Module, optimizer: Optimizer, rank_info: RankInfo) -> None:
        self._optimizer: Optimizer = optimizer
        self._clip_norm: float | None = config.optim.clip_norm
        self._accumulation: int = accumulation_steps(config, rank_info.world_size)[1]
        self._trained: list[nn.Parameter] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._state = ReplicatedState(module, optimizer, rank_info.rank)
        self._num_backwards: int = 0
        self._module: nn.Module = _wrap_in_ddp(module) if rank_info.world_size > 1 else module

    def forward(self, batch: Any) -> Any:
        is_last = self._num_backwards == self._accumulation - 1
        if isinstance(self._module, DistributedDataParallel) and not is_last:
            # Gradients accumulate locally and are summed over ranks once, in the last backward pass.
            # DistributedDataParallel decides in forward whether the next backward pass communicates.
            with self._module.no_sync():
                return self._module(batch)
        return self._module(batch)

    def backward(self, loss: Tensor) -> None:
        self._num_backwards += 1
        propagate_nonfinite_loss(loss).backward()

    def step(self) -> StepOutcome:
        check_num_backwards(self._num_backwards, self._accumulation)
        self._num_backwards = 0
        # The summed gradients are bit-equal on all ranks, so all ranks make the same decision without communicating.
        norm = clip_gradients(self._trained, self._clip_norm)
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
        # Drop the wrapper, whose hooks on the parameters would sum later gradients over ranks.
        if isinstance(self._module, DistributedDataParallel):
            self._module = self._module.module


def _wrap_in_ddp(module: nn.Module) -> DistributedDataParallel:
    wrapped = DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(None, _sum_bucket)
    return wrapped


def _sum_bucket(
    _: None,
    bucket: dist.GradBucket,  # pyright: ignore[reportPrivateImportUsage]
) -> torch.futures.Future[Tensor]:
    """Sum a bucket of gradients over ranks, where DistributedDataParallel would compute the mean."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    assert work is not None
    return work.get_future().then(lambda future: future.value()[0])
