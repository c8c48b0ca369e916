"""The trainings that are compared: engines of the package, a minimal PyTorch loop, and single fused operations."""

import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.train_step.report import BARE, COMPILED, DDP, DEFAULT, PLAIN, ZERO
from benchmarks.train_step.workload import NUM_SAMPLES, StepWorkload
from iwm_fast.engines.base import Engine, StepOutcome
from iwm_fast.engines.factory import build_engine
from iwm_fast.engines.optimizer import build_optimizer
from iwm_fast.engines.torch_engine import TorchEngine
from iwm_fast.kernels.ops import FUSED, REFERENCE, Ops
from iwm_fast.models.layers import compile_blocks
from iwm_fast.models.student import build_student, choose_ops, compute_dtype
from iwm_fast.pipelines.batch import Batch
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.objective import Objective
from iwm_fast.training.schedules import build_schedules
from iwm_fast.training.step import train_step
from iwm_fast.training.step_report import StepReport
from iwm_fast.training.teacher import Teacher


class Variant(NamedTuple):
    """What distinguishes a training from the others."""

    runtime: dict[str, Any]
    """Runtime settings; without "engine" the bare loop trains."""
    ops: Ops | None = None
    """Operations of the networks; None for those that `runtime.ops` selects."""


def engine_variants(workload: StepWorkload, rank_info: RankInfo, *, with_deepspeed: bool) -> dict[str, Variant]:
    """Return the engines that are compared: on several ranks all stages of ZeRO, on a GPU also compiled ones."""
    stages = {name: Variant({"engine": "deepspeed", "zero_stage": stage}) for stage, name in enumerate(ZERO)}
    plain, stages = Variant({"engine": "plain"}), stages if with_deepspeed else {}
    if rank_info.world_size > 1:
        return {DDP: plain, **stages}
    engines = {BARE: Variant({}), PLAIN: plain} | {name: each for name, each in stages.items() if name == DEFAULT}
    compiled = {name + COMPILED: Variant(each.runtime | {"compile": True}) for name, each in engines.items()}
    return engines | (compiled if workload.with_compile else {})


def has_deepspeed() -> bool:
    """Return whether DeepSpeed is installed."""
    return find_spec("deepspeed") is not None


def ops_variants(workload: StepWorkload) -> dict[str, Variant]:
    """Return the plain engine with each choice of operations, first eager, then compiled."""
    ops = {
        "reference": REFERENCE,
        "fused": FUSED,
        "fused attention only": REFERENCE._replace(ragged_attention=FUSED.ragged_attention),
        "fused norm only": REFERENCE._replace(residual_norm=FUSED.residual_norm),
    }
    settings = {"": {"engine": "plain"}} | (
        {COMPILED: {"engine": "plain", "compile": True}} if workload.with_compile else {}
    )
    return {name + suffix: Variant(runtime, each) for suffix, runtime in settings.items() for name, each in ops.items()}


class BareEngine(TorchEngine):
    """Forward, backward, clipping and step as a minimal PyTorch loop does them, without a check for finite values."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> StepOutcome:
        nn.utils.clip_grad_norm_(self._trained, self._clip_norm or torch.inf)
        self._optimizer.step()
        self._optimizer.zero_grad()
        # Reading the norm would wait for the device.
        return StepOutcome(applied=True, grad_norm=math.nan)


class Training:
    """A training run that advances step by step."""

    def __init__(self, variant: Variant, workload: StepWorkload, rank_info: RankInfo) -> None:
        config, device = workload.config(**variant.runtime), rank_info.device
        self._device = device
        self._initial_bytes = allocated_bytes(device)
        student = build_student(config, variant.ops or choose_ops(config, device)).to(device)
        self._teacher = Teacher(student.encoder, compute_dtype(config))
        if config.runtime.compile:
            # Blocks that Dynamo silently runs eagerly would be timed as compiled ones.
            torch._dynamo.config.fail_on_recompile_limit_hit = True
            compile_blocks(student)
            compile_blocks(self._teacher.encoder)
        optimizer = build_optimizer(student, config.optim)
        build = build_engine if "engine" in variant.runtime else BareEngine
        self._engine: Engine = build(config, student, optimizer, rank_info)
        self._objective = Objective(config.objective, is_identity=False)
        self._schedules = build_schedules(config.optim, NUM_SAMPLES)
        self._num_steps = 0
        self.losses: list[float] = []
        """Losses of the first steps on this rank's share of the batches."""
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

    def warm_up(self, batches: Iterator[Batch], steps: int) -> None:
        """Run the first steps, and set `losses` and `resident_bytes`."""
        self.losses = [float(self.step(batches).loss) for _ in range(steps)]
        self.resident_bytes = allocated_bytes(self._device) - self._initial_bytes


def allocated_bytes(device: torch.device) -> int:
    """Return the bytes that PyTorch has allocated on a GPU; 0 for a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
