"""The training step that is compared: networks, batch size, and made-up batches on the masks of training."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.harness import machine
from benchmarks.harness.masks import masked_batch
from benchmarks.train_step.report import BASE, SMALL
from iwm_fast.config.run import EncoderConfig, ModelConfig, OptimConfig, PredictorConfig, RunConfig, RuntimeConfig
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import DataConfig
from iwm_fast.pipelines.transforms.composition import ViewConfig, identity_draws
from iwm_fast.pipelines.transforms.operations.blur import Blur
from iwm_fast.runtime.distributed import RankInfo

NUM_VIEWS = 4
"""Batches of pixels, which are repeated."""
NUM_SAMPLES = 10**6
"""Length of the epoch that the schedules are for."""


class StepBudget(NamedTuple):
    """How long to measure steps that are compared."""

    rounds: int
    steps: int
    """Steps per round of one engine."""
    warm_ups: int
    """Steps before the first round, whose losses are compared."""


@dataclass(frozen=True, kw_only=True)
class StepWorkload:
    """The networks, data and batch size of a step."""

    name: str
    """Name of the networks in the records."""
    device: torch.device
    batch_size: int
    """Images per step over all ranks."""
    budget: StepBudget
    model: ModelConfig
    precision: str
    views: ViewConfig = field(default_factory=ViewConfig)
    with_compile: bool = True

    def shape(self, num_ranks: int) -> dict[str, int | str]:
        """Return the properties that comparable records share."""
        return {"model": self.name, "view": self.views.size, "B": self.batch_size, "ranks": num_ranks}

    def config(self, shards: str = "", **runtime: Any) -> RunConfig:
        """Return the settings of a training run with one micro-batch per step and one decoding thread per core."""
        return RunConfig(
            data=DataConfig(train=shards),
            views=self.views,
            model=self.model,
            optim=OptimConfig(global_batch_size=self.batch_size, precision=self.precision),  # pyright: ignore[reportArgumentType]
            runtime=RuntimeConfig(device=self.device.type, loader_threads=machine.num_cores(), **runtime),  # pyright: ignore[reportArgumentType]
        )

    def batches(self, rank_info: RankInfo) -> list[Batch]:
        """Return this rank's batches of all steps: noise for pixels and actions, each with its own masks of training.

        Repeated masks would hide what a new number of rows costs, such as a graph that cuDNN builds for it.
        """
        share = self.batch_size // rank_info.world_size
        slots = rank_info.rank * share + np.arange(share)
        shape = 2, share, 3, self.views.size, self.views.size
        generators = (torch.Generator().manual_seed(number) for number in range(NUM_VIEWS))
        views = [torch.randn(shape, generator=generator).to(rank_info.device) for generator in generators]
        num_steps = self.budget.warm_ups + self.budget.rounds * self.budget.steps
        return [self._batch(slots, step, views[step % NUM_VIEWS]) for step in range(num_steps)]

    def _batch(self, slots: np.ndarray, step: int, views: torch.Tensor) -> Batch:
        generator, count, number = torch.Generator().manual_seed(step), len(slots), torch.from_numpy(slots)
        context, target = masked_batch(self.batch_size, slots, grid=self.config().grid, step=step)
        device = views.device
        return Batch(
            source_view=views[0],
            target_view=views[1],
            action=torch.randn(count, len(self.views.entries), generator=generator).to(device),
            context=context.to(device),
            target=target.to(device),
            crop_window=torch.zeros(count, 4),
            source_window=torch.zeros(count, 4),
            label=number,
            sample=number,
            scheduled_sample=number,
            slot=number,
            key=("noise",) * count,
            step=step,
            draws=identity_draws(self.views, count),
        )


def build_workload(device: torch.device, quick: bool) -> StepWorkload:
    """Return the workload for this machine: a ViT-S/16 on a CPU, a ViT-B/16 on a GPU, or tiny networks if quick."""
    if quick:
        return StepWorkload(
            device=device,
            name="tiny",
            batch_size=4,
            budget=StepBudget(rounds=2, steps=1, warm_ups=2),
            # The fused attention supports head dimensions of 32 and 64.
            model=ModelConfig(
                encoder=EncoderConfig(dim=64, depth=2, num_heads=2, patch_size=4),
                predictor=PredictorConfig(dim=32, depth=1, num_heads=1),
            ),
            # Compiled, the fused attention takes half precision only.
            precision="bf16" if device.type == "cuda" else "fp32",
            views=ViewConfig(size=16, blur=Blur(sigma=(0.1, 1.0))),
            with_compile=False,
        )
    if device.type == "cuda":
        return StepWorkload(
            device=device,
            name=BASE,
            batch_size=256,
            budget=StepBudget(rounds=5, steps=10, warm_ups=4),
            model=ModelConfig(predictor=PredictorConfig(depth=18)),
            precision="bf16",
        )
    encoder, predictor = EncoderConfig(dim=384, depth=12, num_heads=6), PredictorConfig(dim=192, depth=6, num_heads=6)
    return StepWorkload(
        device=device,
        name=SMALL,
        batch_size=8,
        # A step takes three seconds on one core.
        budget=StepBudget(rounds=6, steps=1, warm_ups=2),
        model=ModelConfig(encoder=encoder, predictor=predictor),
        precision="fp32",
        with_compile=False,
    )
