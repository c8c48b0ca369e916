"""The DeepSpeed engine: ZeRO stages 1 and 2 over float32 parameters; the only file that imports deepspeed.

Stage 1 and 2 keep whole weights on every rank and shard Adam's moments: per parameter group one flat float32 vector,
cut into equal parts, one per rank. The portable state is read from and written to these parts directly; DeepSpeed's
own accessors fail with two parameter groups ("exp_avg not found") and leave the model's copy of a weight stale.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from iwm_fast.config import RunConfig, accumulation_steps
from iwm_fast.distributed import Place, join_over_ranks
from iwm_fast.engine_state import (
    MOMENTS,
    StepOutcome,
    adam_steps,
    check_state,
    copy_to_host,
    get_moment,
    poison_unless_finite,
    set_moments,
)
from iwm_fast.optim import set_hyperparameters

# elements; DeepSpeed's 5e8 allocates 2 GB per backward. 64 MiB is past the size at which all-reduce saturates
REDUCE_BUCKET_SIZE = 2**24


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """Return every DeepSpeed setting of a run, `runtime.deepspeed` merged over ours.

    Raises:
        ValueError: if `runtime.deepspeed` contradicts a setting of ours, or batch, ranks and micro-batch do not divide.
    """
    micro_batch_size, accumulation = accumulation_steps(config, world_size)
    ours = {
        "train_batch_size": config.optim.global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        # the loss is already divided by the global number of targets
        "gradient_allreduce_op": "sum",
        "gradient_clipping": config.optim.clip_norm or 0.0,
        "zero_optimization": {
            "stage": config.runtime.zero_stage or 1,
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
    """A module trained by DeepSpeed ZeRO; see `iwm_fast.engine.Engine`."""

    def __init__(self, config: RunConfig, module: nn.Module, optimizer: Optimizer, place: Place) -> None:
        settings = deepspeed_config(config, place.world_size)
        deepspeed = _import_deepspeed(place.device)
        with _local_rank_in_environment(place.local_rank):
            self._engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        self._module = module
        self._rank = place.rank
        self._accumulation = settings["gradient_accumulation_steps"]
        self._num_backwards = 0

    def forward(self, batch: Any) -> Any:
        return self._engine(batch)

    def backward(self, loss: Tensor) -> None:
        self._num_backwards += 1
        # DeepSpeed counts calls of its step(); we call it once per optimiser step
        self._engine.set_gradient_accumulation_boundary(self._num_backwards == self._accumulation)
        self._engine.backward(poison_unless_finite(loss), scale_wrt_gas=False)

    def step(self) -> StepOutcome:
        if self._num_backwards != self._accumulation:
            raise RuntimeError(f"step() after {self._num_backwards} micro-batches; it must follow {self._accumulation}")
        self._num_backwards = 0
        self._engine.step()
        # a skip is silent otherwise
        return StepOutcome(
            applied=self._engine.was_step_applied(), grad_norm=float(self._engine.get_global_grad_norm())
        )

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        yield from self._module.named_parameters()

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        set_hyperparameters(self._zero.optimizer, lr, weight_decay)

    def state(self) -> dict[str, Tensor]:
        state = {}
        if self._rank == 0:
            state |= {f"weight/{name}": copy_to_host(weight) for name, weight in self._module.named_parameters()}
            state["adam_step"] = torch.tensor(float(adam_steps(self._zero.optimizer)))
        for group, part in enumerate(self._zero.single_partition_of_fp32_groups):
            for moment in MOMENTS:
                whole = join_over_ranks(get_moment(self._zero.optimizer, part, moment))
                if self._rank == 0:
                    state |= {f"{moment}/{name}": copy_to_host(row) for name, row in self._split(whole, group)}
        return state

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor]) -> None:
        check_state(state, self._module.named_parameters())
        for name, parameter in self._module.named_parameters():
            parameter.copy_(state[f"weight/{name}"])
        # the model's copy is written; this brings each rank's own part of it up to date
        self._zero.refresh_fp32_params()
        for group, part in enumerate(self._zero.single_partition_of_fp32_groups):
            moments = {}
            for moment in MOMENTS:
                # what pads the vector to equal parts stays zero
                whole = torch.zeros(self._zero.bit16_groups_flat[group].numel())
                for name, row in self._split(whole, group):
                    row.copy_(state[f"{moment}/{name}"])
                moments[moment] = whole.split(part.numel())[self._rank]
            set_moments(self._zero.optimizer, part, int(state["adam_step"]), moments)

    @property
    def _zero(self) -> Any:
        return self._engine.optimizer

    def _split(self, whole: Float[Tensor, "padded"], group: int) -> Iterator[tuple[str, Tensor]]:
        """Yield the name of each parameter of a group and a view of its piece of the group's flat vector."""
        names = {id(parameter): name for name, parameter in self._module.named_parameters()}
        offsets = self._zero.round_robin_bit16_offsets[group]
        for parameter, offset in zip(self._zero.round_robin_bit16_groups[group], offsets, strict=True):
            yield names[id(parameter)], whole[offset : offset + parameter.numel()].view(parameter.shape)


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
    """DeepSpeed insists on this variable while it starts, also with one process."""
    is_missing = "LOCAL_RANK" not in os.environ
    os.environ["LOCAL_RANK"] = str(local_rank)
    try:
        yield
    finally:
        if is_missing:
            del os.environ["LOCAL_RANK"]
