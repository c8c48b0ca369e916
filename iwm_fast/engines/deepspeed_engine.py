"""The DeepSpeed engine: ZeRO stages 0 to 3 over float32 parameters; the only file that imports deepspeed.

Stage 0 shards nothing, 1 Adam's moments, 2 the gradients too, 3 the weights too; see `deepspeed_state`.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from iwm_fast.config.run import RunConfig, accumulation_steps
from iwm_fast.engines.base import StepOutcome
from iwm_fast.engines.deepspeed_state import PartitionedMoments, PartitionedParameters, replace_parameters
from iwm_fast.engines.gradients import check_num_backwards, clip_gradients, propagate_nonfinite_loss
from iwm_fast.engines.optimizer import set_hyperparameters
from iwm_fast.engines.portable_state import ReplicatedState
from iwm_fast.runtime.distributed import RankInfo

# elements; DeepSpeed's 5e8 allocates 2 GB per backward. 64 MiB is past the size at which all-reduce saturates
REDUCE_BUCKET_SIZE = 2**24


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Return every DeepSpeed setting of a run, `runtime.deepspeed` merged over ours.

    Raises:
        ValueError: if `runtime.deepspeed` contradicts a setting of ours, or batch, ranks and micro-batch do not divide.
    """
    micro_batch_size, accumulation = accumulation_steps(config, world_size)
    stage = 1 if config.runtime.zero_stage is None else config.runtime.zero_stage
    ours = {
        "train_batch_size": config.optim.global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # the loss is already divided by the global number of targets
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        # at stage 0 the engine does it itself
        "gradient_clipping": (stage > 0 and config.optim.clip_norm) or 0.0,
        "zero_optimization": {
            "stage": stage,
            # a step that is not finite is recognised by its norm
            "compute_grad_norm": True,
            # state() and load_state() expect the moments on the device, in the order of the parameters
            "offload_optimizer": None,
            "round_robin_gradients": False,
        },
        "managed_gradient_accumulation": True,
        # the module casts inside its own forward; parameters, gradients and moments stay float32
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "steps_per_print": 10**9,
    }
    # these may be changed: they steer speed only
    tuned = {
        "zero_optimization": {"reduce_bucket_size": REDUCE_BUCKET_SIZE},
        # it synchronises the device in every step; speed is measured in metrics.py
        "timers": {"throughput": {"enabled": False}},
    }
    _refuse_conflicts(ours, config.runtime.deepspeed, "")
    return _merge(_merge(tuned, config.runtime.deepspeed), ours)


def _refuse_conflicts(ours: dict[str, Any], theirs: dict[str, Any], prefix: str) -> None:
    for name, value in theirs.items():
        if name in ("optimizer", "scheduler") and not prefix:
            raise ValueError(f"runtime.deepspeed.{name} must be unset: AdamW and its schedules are set in optim")
        if name not in ours:
            continue
        if isinstance(value, dict) and isinstance(ours[name], dict):
            _refuse_conflicts(ours[name], value, f"{prefix}{name}.")
        elif value != ours[name]:
            raise ValueError(
                f"runtime.deepspeed.{prefix}{name} = {value!r} contradicts our {ours[name]!r}; remove it, "
                f"or set optim, runtime.zero_stage or runtime.micro_batch_size, which it follows from"
            )


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        is_group = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if is_group else value
    return merged


class DeepSpeedEngine:
    """A module trained by DeepSpeed ZeRO; see `iwm_fast.engines.base.Engine`."""

    def __init__(self, config: RunConfig, module: nn.Module, optimizer: Optimizer, rank_info: RankInfo) -> None:
        settings = deepspeed_config(config, rank_info.world_size)
        self._stage = settings["zero_optimization"]["stage"]
        self._module = module
        self._trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        deepspeed = _import_deepspeed(rank_info.device)
        self._local_rank = rank_info.local_rank
        with _local_rank_in_environment(rank_info.local_rank):
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self._state = self._choose_state(module, rank_info.rank)
        self._clip_norm = config.optim.clip_norm
        self._accumulation = settings["gradient_accumulation_steps"]
        self._num_backwards = 0
        # stage 3 knows no sums and takes the mean over ranks
        self._loss_scale = rank_info.world_size if self._stage == 3 else 1
        if self._stage == 3:
            for part in module.modules():
                for parameter in getattr(part, "external_parameters", tuple)():
                    deepspeed.zero.register_external_parameter(part, parameter)

    def _choose_state(
        self, module: nn.Module, rank: int
    ) -> ReplicatedState | PartitionedMoments | PartitionedParameters:
        if self._stage == 0:
            return ReplicatedState(module, self._engine.optimizer, rank)
        kind = PartitionedParameters if self._stage == 3 else PartitionedMoments
        return kind(module, self._engine.optimizer, rank)

    def forward(self, batch: Any) -> Any:
        with _local_rank_in_environment(self._local_rank):
            return self._engine(batch)

    def backward(self, loss: Tensor) -> None:
        self._num_backwards += 1
        # DeepSpeed counts calls of its step(); we call it once per optimiser step
        self._engine.set_gradient_accumulation_boundary(self._num_backwards == self._accumulation)
        with _local_rank_in_environment(self._local_rank):
            self._engine.backward(propagate_nonfinite_loss(loss) * self._loss_scale, scale_wrt_gas=False)

    def step(self) -> StepOutcome:
        check_num_backwards(self._num_backwards, self._accumulation)
        self._num_backwards = 0
        if self._stage == 0:
            return self._step_unsharded()
        self._engine.step()
        # a skip is silent otherwise
        return StepOutcome(
            applied=self._engine.was_step_applied(), grad_norm=float(self._engine.get_global_grad_norm())
        )

    def _step_unsharded(self) -> StepOutcome:
        # at this stage DeepSpeed would take what is not finite into the weights
        norm = clip_gradients(self._trained, self._clip_norm)
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return StepOutcome(applied=math.isfinite(norm), grad_norm=norm)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        return self._state.named_parameters(prefix)

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        # ZeRO wraps the optimiser
        optimizer = self._engine.optimizer if self._stage == 0 else self._engine.optimizer.optimizer
        set_hyperparameters(optimizer, lr, weight_decay)

    def state(self) -> dict[str, Tensor]:
        return self._state.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._state.load_state(state)

    def release(self) -> None:
        whole = {name: weight.clone() for name, weight in self.named_parameters()} if self._stage == 3 else {}
        self._engine.destroy()
        if whole:
            replace_parameters(self._module, whole)


def _import_deepspeed(device: torch.device) -> ModuleType:
    # decided when deepspeed is imported; without it a CPU run on a GPU machine would take the GPU
    chosen = os.environ.setdefault("DS_ACCELERATOR", device.type)
    if chosen != device.type:
        raise RuntimeError(
            f"DS_ACCELERATOR is {chosen!r} but the run is on {device.type!r}; unset it or set runtime.device"
        )
    import deepspeed  # noqa: PLC0415 (3 s, and it must see the line above)
    from deepspeed.utils import groups  # noqa: PLC0415

    # it would compile a shared-memory collective that only inference uses: 46 s, and an error without g++ and ninja
    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    # groups of a process group that was stopped meanwhile; only tests start twice
    groups._release_process_group_references()
    return deepspeed


@contextmanager
def _local_rank_in_environment(local_rank: int) -> Iterator[None]:
    """DeepSpeed insists on this variable, also with one process."""
    is_missing = "LOCAL_RANK" not in os.environ
    os.environ["LOCAL_RANK"] = str(local_rank)
    try:
        yield
    finally:
        if is_missing:
            del os.environ["LOCAL_RANK"]
