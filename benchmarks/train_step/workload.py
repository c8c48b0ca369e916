"""What every training step of a comparison does, and the batch they all take."""

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


class StepTurns(NamedTuple):
    """How long to measure steps that are compared."""

    rounds: int
    steps: int
    """Of one turn."""
    warm_ups: int
    """Steps before the first turn; their losses are compared, too."""


@dataclass(frozen=True, kw_only=True)
class StepWorkload:
    """The work of a step, whoever does it."""

    name: str
    """Of the networks."""
    folder: Path
    """Where shards are kept."""
    device: torch.device
    batch_size: int
    """Images of a step, over all ranks."""
    turns: StepTurns
    model: ModelConfig
    precision: str
    views: ViewConfig = field(default_factory=ViewConfig)
    photographs: PhotographShards = field(default_factory=lambda: PhotographShards(num_shards=8))
    with_compile: bool = True

    @cached_property
    def pattern(self) -> str:
        """The shards, written when they are first asked for."""
        return self.photographs.write(self.folder)

    def shape(self, num_ranks: int) -> dict[str, int | str]:
        """Return what is compared with each other, for records."""
        return {"model": self.name, "view": self.views.size, "B": self.batch_size, "ranks": num_ranks}

    def config(self, **runtime: Any) -> RunConfig:
        """Return a run's settings: one micro-batch a step, all cores decoding."""
        return RunConfig(
            data=DataConfig(train=self.pattern),
            views=self.views,
            model=self.model,
            optim=OptimConfig(global_batch_size=self.batch_size, precision=self.precision),  # pyright: ignore[reportArgumentType]
            runtime=RuntimeConfig(device=self.device.type, loader_threads=machine.num_cores(), **runtime),  # pyright: ignore[reportArgumentType]
        )

    def loader(self, rank_info: RankInfo) -> Loader:
        """Open the loader of a run."""
        return training_loader(self.config(), open_shards(self.pattern), rank_info)

    def cached_batch(self, rank_info: RankInfo) -> Batch:
        """Return this rank's first batch of a run in memory of its own."""
        with closing(self.loader(rank_info)) as loader:
            return _copy(next(loader))


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Batch | RaggedIndex):
        copies = {item.name: _copy(getattr(value, item.name)) for item in dataclasses.fields(value)}
        return dataclasses.replace(value, **copies)
    return value


def build_workload(folder: Path, device: torch.device, is_quick: bool) -> StepWorkload:
    """Return what this machine is measured with: a ViT-S/16 on a CPU, a ViT-B/16 on a GPU, or something tiny."""
    common: dict[str, Any] = {"folder": folder, "device": device}
    if is_quick:
        return StepWorkload(
            **common,
            name="tiny",
            batch_size=4,
            turns=StepTurns(rounds=2, steps=1, warm_ups=2),
            # heads of 32, for the kernels
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
            turns=StepTurns(rounds=7, steps=10, warm_ups=3),
            model=ModelConfig(predictor=PredictorConfig(depth=18)),
            precision="bf16",
            # more than a turn takes, however often it comes
            photographs=PhotographShards(),
        )
    encoder, predictor = EncoderConfig(dim=384, depth=12, num_heads=6), PredictorConfig(dim=192, depth=6, num_heads=6)
    return StepWorkload(
        **common,
        name=SMALL,
        batch_size=8,
        # a step takes three seconds on one core
        turns=StepTurns(rounds=6, steps=1, warm_ups=2),
        model=ModelConfig(encoder=encoder, predictor=predictor),
        precision="fp32",
    )
