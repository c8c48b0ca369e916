"""The engines that are compared: those of the package, and a minimal PyTorch training loop without an engine."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.train_step.report import BARE, COMPILED, DDP, DEFAULT, FUSED, PLAIN, ZERO
from benchmarks.train_step.workload import StepWorkload
from iwm_fast.config.run import RunConfig
from iwm_fast.engines.base import Engine, StepOutcome
from iwm_fast.engines.optimizer import build_optimizer, set_hyperparameters
from iwm_fast.models.student import build_student, choose_ops, compute_dtype
from iwm_fast.pipelines.batch import Batch
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.components import build_components
from iwm_fast.training.objective import Objective
from iwm_fast.training.schedules import build_schedules
from iwm_fast.training.step import StepReport, train_step
from iwm_fast.training.teacher import Teacher

EngineConfigs = dict[str, dict[str, Any]]
"""Runtime settings by name; settings without "engine" select the bare loop."""

ENGINES: EngineConfigs = {
    PLAIN: {"engine": "plain"},
    **{name: {"engine": "deepspeed", "zero_stage": stage} for stage, name in enumerate(ZERO)},
}
TWO_RANK_ENGINES: EngineConfigs = {DDP if name == PLAIN else name: engine for name, engine in ENGINES.items()}


def engine_configs(workload: StepWorkload) -> EngineConfigs:
    """Return the settings for one process: bare loop and engines, with and without fused kernels and torch.compile."""
    is_gpu = workload.device.type == "cuda"
    ops, suffix = ({"ops": "fused"}, FUSED) if is_gpu else ({}, "")
    configs = {BARE + suffix: ops, **{name + suffix: engine | ops for name, engine in ENGINES.items()}}
    if is_gpu:
        configs |= {BARE: {}, **{name: ENGINES[name] for name in (PLAIN, DEFAULT)}}
    if workload.with_compile:
        configs |= {name + suffix + COMPILED: ENGINES[name] | ops | {"compile": True} for name in (PLAIN, DEFAULT)}
    return configs


class BareEngine:
    """An `iwm_fast.engines.base.Engine` for one process, without checkpoints and without a check for finite values."""

    def __init__(self, config: RunConfig, module: nn.Module, optimizer: Optimizer) -> None:
        self._module = module
        self._optimizer = optimizer
        self._clip_norm: float = config.optim.clip_norm or torch.inf

    def forward(self, batch: Batch) -> Any:
        return self._module(batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> StepOutcome:
        nn.utils.clip_grad_norm_(self._module.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        # Reading the norm would wait for the device.
        return StepOutcome(applied=True, grad_norm=math.nan)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        return ((name, parameter) for name, parameter in self._module.named_parameters() if name.startswith(prefix))

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        set_hyperparameters(self._optimizer, lr, weight_decay)

    def state(self) -> dict[str, Tensor]:
        raise NotImplementedError("the bare loop has no state to save")

    def load_state(self, state: dict[str, Tensor]) -> None:
        raise NotImplementedError("the bare loop has no state to load")

    def release(self) -> None:
        raise NotImplementedError("the bare loop has no memory to release")


class Training:
    """A training run that advances step by step, with runtime settings from `EngineConfigs`."""

    def __init__(self, runtime: dict[str, Any], workload: StepWorkload, rank_info: RankInfo) -> None:
        self.config = workload.config(**runtime)
        self._device = rank_info.device
        self._initial_bytes = allocated_bytes(self._device)
        if "engine" in runtime:
            components = build_components(self.config, rank_info)
            parts = components.engine, components.teacher, components.objective
        else:
            parts = _build_bare(self.config, rank_info)
        self._engine, self._teacher, self._objective = parts
        self._schedules = build_schedules(self.config.optim, workload.photographs.num_samples)
        self._num_steps = 0
        self.resident_bytes = 0
        """GPU memory that stays allocated between steps, such as weights and optimizer state."""

    def step(self, batches: Iterator[Batch]) -> StepReport:
        """Run one training step."""
        report = train_step(
            self._engine, self._teacher, self._objective, batches, self._schedules,
            applied_steps=self._num_steps, accumulation=1,
        )  # fmt: skip
        self._num_steps += 1
        return report

    def warm_up(self, batches: Iterator[Batch], steps: int) -> list[float]:
        """Run the first steps, set `resident_bytes`, and return the losses of this rank's share of the batch."""
        losses = [float(self.step(batches).loss) for _ in range(steps)]
        self.resident_bytes = allocated_bytes(self._device) - self._initial_bytes
        return losses


def _build_bare(config: RunConfig, rank_info: RankInfo) -> tuple[Engine, Teacher, Objective]:
    student = build_student(config, choose_ops(config, rank_info.device)).to(rank_info.device)
    engine = BareEngine(config, student, build_optimizer(student, config.optim))
    return engine, Teacher(student.encoder, compute_dtype(config)), Objective(config.objective, is_identity=False)


def allocated_bytes(device: torch.device) -> int:
    """Return the bytes that PyTorch has allocated on a GPU; 0 for a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
