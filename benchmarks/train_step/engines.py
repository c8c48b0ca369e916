"""Who trains: the engines of the product, and the loop anyone would write without one."""

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

Contestants = dict[str, dict[str, Any]]
"""Settings of a run by the name of the way to train; without an engine it is the bare loop."""


ENGINES: Contestants = {
    PLAIN: {"engine": "plain"},
    **{name: {"engine": "deepspeed", "zero_stage": stage} for stage, name in enumerate(ZERO)},
}
CONTESTANTS_OF_RANKS: Contestants = {DDP if name == PLAIN else name: engine for name, engine in ENGINES.items()}


def contestants_of(workload: StepWorkload) -> Contestants:
    """Return who trains in one process: every engine, and with and without what a GPU or a compiler adds."""
    is_gpu = workload.device.type == "cuda"
    ops, ending = ({"ops": "fused"}, FUSED) if is_gpu else ({}, "")
    found = {BARE + ending: ops, **{name + ending: engine | ops for name, engine in ENGINES.items()}}
    if is_gpu:
        found |= {BARE: {}, **{name: ENGINES[name] for name in (PLAIN, DEFAULT)}}
    if workload.with_compile:
        found |= {name + ending + COMPILED: ENGINES[name] | ops | {"compile": True} for name in (PLAIN, DEFAULT)}
    return found


class BareEngine:
    """Backward, clip, step as anyone writes them: no look at what is not finite, no state, one process."""

    def __init__(self, config: RunConfig, module: nn.Module, optimizer: Optimizer) -> None:
        self._module, self._optimizer, self._clip_norm = module, optimizer, config.optim.clip_norm or torch.inf

    def forward(self, batch: Batch) -> Any:
        """See `iwm_fast.engines.base.Engine`, as for the others."""
        return self._module(batch)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> StepOutcome:
        nn.utils.clip_grad_norm_(self._module.parameters(), self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        # to look at the norm would mean to wait for the device
        return StepOutcome(applied=True, grad_norm=math.nan)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
        return (row for row in self._module.named_parameters() if row[0].startswith(prefix))

    def set_hyperparameters(self, lr: float, weight_decay: float) -> None:
        set_hyperparameters(self._optimizer, lr, weight_decay)

    def state(self) -> dict[str, Tensor]:
        raise NotImplementedError("a bare loop saves nothing")

    def load_state(self, state: dict[str, Tensor]) -> None:
        raise NotImplementedError("a bare loop loads nothing")

    def release(self) -> None:
        raise NotImplementedError("a bare loop holds nothing that it could give back")


class Training:
    """A run that has been built and goes on step by step."""

    def __init__(self, runtime: dict[str, Any], workload: StepWorkload, rank_info: RankInfo) -> None:
        self.config = workload.config(**runtime)
        self._before, self._device = allocated(rank_info.device), rank_info.device
        if "engine" in runtime:
            built = build_components(self.config, rank_info)
            self._engine, self._teacher, self._objective = built.engine, built.teacher, built.objective
        else:
            self._engine, self._teacher, self._objective = _build_bare(self.config, rank_info)
        self._schedules = build_schedules(self.config.optim, workload.photographs.num_samples)
        self._num_steps = 0
        self.kept_bytes = 0
        """Weights, moments and whatever else stays between steps, on a GPU."""

    def step(self, batches: Iterator[Batch]) -> StepReport:
        """Run one step."""
        report = train_step(
            self._engine, self._teacher, self._objective, batches, self._schedules,
            applied_steps=self._num_steps, accumulation=1,
        )  # fmt: skip
        self._num_steps += 1
        return report

    def warm_up(self, batches: Iterator[Batch], steps: int) -> list[float]:
        """Run the first steps; return this rank's losses."""
        losses = [float(self.step(batches).loss) for _ in range(steps)]
        self.kept_bytes = allocated(self._device) - self._before
        return losses


def _build_bare(config: RunConfig, rank_info: RankInfo) -> tuple[Engine, Teacher, Objective]:
    student = build_student(config, choose_ops(config, rank_info.device)).to(rank_info.device)
    engine = BareEngine(config, student, build_optimizer(student, config.optim))
    return engine, Teacher(student.encoder, compute_dtype(config)), Objective(config.objective, is_identity=False)


def allocated(device: torch.device) -> int:
    """Return the bytes that torch now has in use on a GPU; 0 for a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
