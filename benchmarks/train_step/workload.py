"""The training step that all engines of a comparison run, and its cached batch."""

import dataclasses
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import machine
from benchmarks.harness.photograph_shards import PhotographShards
from benchmarks.train_step.report import BASE, SMALL
from iwm_fast.config.run import EncoderConfig, ModelConfig, OptimConfig, PredictorConfig, RunConfig, RuntimeConfig
from iwm_fast.pipelines.batch import Batch, RaggedIndex
from iwm_fast.pipelines.config import DataConfig, ViewConfig
from iwm_fast.pipelines.loader import Loader
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.loaders import training_loader


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
    folder: Path
    """Folder in which the shards are stored."""
    device: torch.device
    batch_size: int
    """Images per step over all ranks."""
    budget: StepBudget
    model: ModelConfig
    precision: str
    views: ViewConfig = field(default_factory=ViewConfig)
    photographs: PhotographShards = field(default_factory=lambda: PhotographShards(num_shards=8))
    with_compile: bool = True

    @cached_property
    def pattern(self) -> str:
        """Pattern of the shards, which are written on first access."""
        return self.photographs.write(self.folder)

    def shape(self, num_ranks: int) -> dict[str, int | str]:
        """Return the properties that comparable records share."""
        return {"model": self.name, "view": self.views.size, "B": self.batch_size, "ranks": num_ranks}

    def config(self, **runtime: Any) -> RunConfig:
        """Return the settings of a training run with one micro-batch per step and one decoding thread per core."""
        return RunConfig(
            data=DataConfig(train=self.pattern),
            views=self.views,
            model=self.model,
            optim=OptimConfig(global_batch_size=self.batch_size, precision=self.precision),  # pyright: ignore[reportArgumentType]
            runtime=RuntimeConfig(device=self.device.type, loader_threads=machine.num_cores(), **runtime),  # pyright: ignore[reportArgumentType]
        )

    def loader(self, rank_info: RankInfo) -> Loader:
        """Open the loader of a training run."""
        return training_loader(self.config(), open_shards(self.pattern), rank_info)

    def cached_batch(self, rank_info: RankInfo) -> Batch:
        """Return a copy of this rank's first batch, which stays valid after the loader is closed."""
        with closing(self.loader(rank_info)) as loader:
            return _copy(next(loader))


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Batch | RaggedIndex):
        copies = {item.name: _copy(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return dataclasses.replace(value, **copies)
    return value


def build_workload(folder: Path, device: torch.device, quick: bool) -> StepWorkload:
    """Return the workload for this machine: a ViT-S/16 on a CPU, a ViT-B/16 on a GPU, or tiny networks if quick."""
    common: dict[str, Any] = {"folder": folder, "device": device}
    if quick:
        return StepWorkload(
            **common,
            name="tiny",
            batch_size=4,
            budget=StepBudget(rounds=2, steps=1, warm_ups=2),
            # The fused attention supports head dimensions of 32 and 64.
            model=ModelConfig(
                encoder=EncoderConfig(dim=64, depth=2, num_heads=2, patch_size=4),
                predictor=PredictorConfig(dim=32, depth=1, num_heads=1),
            ),
            precision="fp32",
            views=ViewConfig(size=16, blur_sigma=(0.1, 1.0)),
            photographs=PhotographShards(num_shards=2, samples_per_shard=16, width=80, height=60),
            with_compile=False,
        )
    if device.type == "cuda":
        return StepWorkload(
            **common,
            name=BASE,
            batch_size=256,
            budget=StepBudget(rounds=7, steps=10, warm_ups=3),
            model=ModelConfig(predictor=PredictorConfig(depth=18)),
            precision="bf16",
            # Enough images for all rounds of the loader.
            photographs=PhotographShards(),
        )
    encoder, predictor = EncoderConfig(dim=384, depth=12, num_heads=6), PredictorConfig(dim=192, depth=6, num_heads=6)
    return StepWorkload(
        **common,
        name=SMALL,
        batch_size=8,
        # A step takes three seconds on one core.
        budget=StepBudget(rounds=6, steps=1, warm_ups=2),
        model=ModelConfig(encoder=encoder, predictor=predictor),
        precision="fp32",
    )
