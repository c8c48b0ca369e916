"""The DeepSpeed engine: ZeRO stages 0 to 3 over float32 parameters; the only file that imports deepspeed.

Stage 0 shards nothing, stage 1 Adam's moments, stage 2 also the gradients, stage 3 also the weights.
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

from iwm_fast.config.batch_size import accumulation_steps
from iwm_fast.config.named_configs import merge_settings
from iwm_fast.config.run import RunConfig
from iwm_fast.engines.base import StepOutcome
from iwm_fast.engines.deepspeed_state import PartitionedMoments, PartitionedParameters, replace_parameters
from iwm_fast.engines.gradients import check_num_backwards, clip_gradients, propagate_nonfinite_loss
from iwm_fast.engines.optimizer import set_hyperparameters
from iwm_fast.engines.portable_state import ReplicatedState
from iwm_fast.runtime.distributed import RankInfo

# In elements. DeepSpeed's default of 5e8 allocates 2 GB in each backward pass. 2**24 float32 elements are 64 MiB, which
# is beyond the size at which an all-reduce reaches its full bandwidth.
REDUCE_BUCKET_SIZE = 2**24


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Return all DeepSpeed settings of a run: those that follow from its configuration, and `runtime.deepspeed`.

    Raises:
        ValueError: if `runtime.deepspeed` conflicts with a setting that follows from the configuration, or if the
            global batch size is not a multiple of world size times micro-batch size.
    """
    micro_batch_size, accumulation = accumulation_steps(config, world_size)
    stage = 1 if config.runtime.zero_stage is None else config.runtime.zero_stage
    fixed = {
        "train_batch_size": config.optim.global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # The loss is already divided by the global number of targets, so gradients are summed. Stage 3 refuses sums;
        # there the engine multiplies the loss by the number of ranks instead.
        "gradient_allreduce_op": "mean" if stage == 3 else "sum",
        # At stage 0 the engine clips, because it needs the norm before DeepSpeed's step.
        "gradient_clipping": (stage > 0 and config.optim.clip_norm) or 0.0,
        "zero_optimization": {
            "stage": stage,
            # DeepSpeed skips a step whose norm is not finite, so it must compute the norm.
            "compute_grad_norm": True,
            # state() and load_state() expect the moments on the device, in the order of the parameters.
            "offload_optimizer": None,
            "round_robin_gradients": False,
        },
        "managed_gradient_accumulation": True,
        # The module uses autocast inside its own forward; parameters, gradients and moments stay float32.
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "torch_autocast": {"enabled": False},
        "steps_per_print": 10**9,
    }
    # Defaults that users may override, because they affect the speed only.
    defaults = {
        "zero_optimization": {"reduce_bucket_size": REDUCE_BUCKET_SIZE},
        # This timer synchronises the device in every step. The training loop measures throughput without that.
        "timers": {"throughput": {"enabled": False}},
    }
    _refuse_conflicts(fixed, config.runtime.deepspeed, "")
    return merge_settings(merge_settings(defaults, config.runtime.deepspeed), fixed)


def _refuse_conflicts(fixed: dict[str, Any], overrides: dict[str, Any], prefix: str) -> None:
    for name, value in overrides.items():
        if name in ("optimizer", "scheduler") and not prefix:
            raise ValueError(f"runtime.deepspeed.{name} must be unset: AdamW and its schedules are set in optim")
        if name not in fixed:
            continue
        if isinstance(value, dict) and isinstance(fixed[name], dict):
            _refuse_conflicts(fixed[name], value, f"{prefix}{name}.")
        elif value != fixed[name]:
            raise ValueError(
                f"runtime.deepspeed.{prefix}{name} must be unset or {fixed[name]!r}, got {value!r}; it follows from "
                f"other settings: set optim, runtime.zero_stage or runtime.micro_batch_size instead"
            )


class DeepSpeedEngine:
    """An engine that trains the module with DeepSpeed ZeRO.

    Its methods are those of `iwm_fast.engines.base.Engine`.
    """

    def __init__(self, config: RunConfig, module: nn.Module, optimizer: Optimizer, rank_info: RankInfo) -> None:
        settings = deepspeed_config(config, rank_info.world_size)
        self._stage: int = settings["zero_optimization"]["stage"]
        self._module: nn.Module = module
        self._trained: list[nn.Parameter] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        deepspeed = import_deepspeed(rank_info.device)
        self._local_rank: int = rank_info.local_rank
        with _local_rank_in_environment(rank_info.local_rank):
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self._state = self._build_state(module, rank_info.rank)
        self._clip_norm: float | None = config.optim.clip_norm
        self._accumulation: int = settings["gradient_accumulation_steps"]
        self._num_backwards: int = 0
        # Stage 3 takes the mean of the gradients over ranks; this makes it the sum.
        self._loss_scale: int = rank_info.world_size if self._stage == 3 else 1
        if self._stage == 3:
            _limit_norm(self._engine.optimizer)
            # DeepSpeed gathers the parameters of a module when the module is called. A module that reads the parameters
            # of another one without calling it lists them, or it would find them empty.
            for submodule in module.modules():
                for parameter in getattr(submodule, "external_parameters", tuple)():
                    deepspeed.zero.register_external_parameter(submodule, parameter)

    def _build_state(
        self, module: nn.Module, rank: int
    ) -> ReplicatedState | PartitionedMoments | PartitionedParameters:
        if self._stage == 0:
            return ReplicatedState(module, self._engine.optimizer, rank)
        state_type = PartitionedParameters if self._stage == 3 else PartitionedMoments
        return state_type(module, self._engine.optimizer, rank)

    def forward(self, batch: Any) -> Any:
        with _local_rank_in_environment(self._local_rank):
            return self._engine(batch)

    def backward(self, loss: Tensor) -> None:
        self._num_backwards += 1
        # DeepSpeed derives the last micro-batch from the number of calls of its own step(), which it expects after each
        # micro-batch. We call it once per optimiser step, so we mark the last micro-batch ourselves.
        self._engine.set_gradient_accumulation_boundary(self._num_backwards == self._accumulation)
        with _local_rank_in_environment(self._local_rank):
            # Without scale_wrt_gas=False, DeepSpeed would divide the loss by the number of micro-batches.
            self._engine.backward(propagate_nonfinite_loss(loss) * self._loss_scale, scale_wrt_gas=False)

    def step(self) -> StepOutcome:
        check_num_backwards(self._num_backwards, self._accumulation)
        self._num_backwards = 0
        if self._stage == 0:
            return self._step_unsharded()
        self._engine.step()
        # DeepSpeed skips a step that is not finite without raising or warning, so the engine has to ask.
        return StepOutcome(applied=self._engine.was_step_applied(), grad_norm=self._engine.get_global_grad_norm())

    def _step_unsharded(self) -> StepOutcome:
        # At stage 0 DeepSpeed does not look at the norm: a single NaN would destroy the weights.
        norm = clip_gradients(self._trained, self._clip_norm)
        if math.isfinite(norm):
            self._engine.step()
        else:
            self._engine.zero_grad()
        return StepOutcome(applied=math.isfinite(norm), grad_norm=norm)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        return self._state.named_parameters(prefix)

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        # From stage 1 on, the optimiser is ZeRO's wrapper, and its groups are those of the wrapped optimiser.
        optimizer = self._engine.optimizer if self._stage == 0 else self._engine.optimizer.optimizer
        set_hyperparameters(optimizer, lr, weight_decay)

    def state(self) -> dict[str, Tensor]:
        return self._state.state()

    def load_state(self, state: dict[str, Tensor]) -> None:
        self._state.load_state(state)

    def release(self) -> None:
        # At stage 3 the weights can only be gathered before DeepSpeed is shut down.
        gathered = {name: weight.clone() for name, weight in self.named_parameters()} if self._stage == 3 else {}
        self._engine.destroy()
        if gathered:
            replace_parameters(self._module, gathered)


def _limit_norm(zero_optimizer: Any) -> None:
    """Let ZeRO stage 3 skip a step whose squared gradient norm overflows float32, as all other engines do.

    It computes the norm in float64 and would apply such a step. Without clipping, Adam's second moments overflow then.
    """
    compute_norms = zero_optimizer._get_norm_groups

    def compute_limited_norms() -> list[Tensor]:
        norms = torch.stack([norm.double() for norm in compute_norms()])
        is_valid = norms.square().sum() <= torch.finfo(torch.float32).max
        return list(torch.where(is_valid, norms, math.inf).unbind())

    zero_optimizer._get_norm_groups = compute_limited_norms


def import_deepspeed(device: torch.device) -> ModuleType:
    """Import DeepSpeed for this type of device.

    Raises:
        RuntimeError: if DS_ACCELERATOR names another type.
    """
    # DeepSpeed chooses its accelerator when it is imported. Left to itself, it would choose the GPU for a CPU run on a
    # machine that has one.
    accelerator = os.environ.setdefault("DS_ACCELERATOR", device.type)
    if accelerator != device.type:
        raise RuntimeError(
            f"DS_ACCELERATOR is {accelerator!r}, but the run is on {device.type!r}; unset it, or set runtime.device"
        )
    # Imported here because it takes 3 s, and because DS_ACCELERATOR must be set before.
    import deepspeed  # noqa: PLC0415
    from deepspeed.utils import groups  # noqa: PLC0415

    if device.type == "cuda":
        from deepspeed.accelerator import cuda_accelerator  # noqa: PLC0415

        # With pynvml, DeepSpeed reads the names in CUDA_VISIBLE_DEVICES as numbers, and fails on UUIDs of GPUs and MIG
        # partitions. Without it, DeepSpeed asks torch for the free memory, which is all that it needs pynvml for.
        cuda_accelerator.pynvml = None

    # DeepSpeed would compile a shared-memory collective that only inference uses. This takes 46 s, and fails without
    # g++ and ninja. An empty table of compatible operations prevents it.
    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    # DeepSpeed keeps references to the groups of a process group that has been stopped since. Only tests start twice.
    groups._release_process_group_references()
    return deepspeed


@contextmanager
def _local_rank_in_environment(local_rank: int) -> Iterator[None]:
    """Set LOCAL_RANK, which DeepSpeed requires even for a single process, and remove it again if it was not set."""
    is_missing = "LOCAL_RANK" not in os.environ
    os.environ["LOCAL_RANK"] = str(local_rank)
    try:
        yield
    finally:
        # It must not remain: with LOCAL_RANK alone, the environment of a later start would be incomplete.
        if is_missing:
            del os.environ["LOCAL_RANK"]
