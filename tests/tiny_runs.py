"""A tiny run of the whole line, shared by tests of training."""

from pathlib import Path

from iwm_fast.config import (
    EncoderConfig,
    ModelConfig,
    OptimConfig,
    OutputConfig,
    PredictorConfig,
    RunConfig,
    RuntimeConfig,
)
from iwm_fast.data import training_loader
from iwm_fast.schedules import build_schedules
from iwm_fast.step import train_step
from iwm_fast.trainer import build_trainer
from pipelines.config import DataConfig, ViewConfig

# tiny shards hold 48 samples, so 12 steps of 16 are 4 epochs and a step often straddles two
STEPS = 12


def tiny_run(shards, folder: Path, *, engine: str = "plain", depth: int = 1, **runtime) -> RunConfig:
    return RunConfig(
        data=DataConfig(train=shards.pattern, shuffle_window=2),
        views=ViewConfig(size=16, blur_sigma=(0.1, 1.0)),
        model=ModelConfig(
            encoder=EncoderConfig(dim=32, depth=2, num_heads=2, patch_size=4),
            predictor=PredictorConfig(dim=16, depth=depth, num_heads=1),
        ),
        optim=OptimConfig(global_batch_size=16, epochs=4.0, warmup_epochs=1.0, lr=2e-3, precision="fp32"),
        runtime=RuntimeConfig(device="cpu", engine=engine, **runtime),
        output=OutputConfig(folder=str(folder), log_every=4, checkpoint_every=5),
    )


def losses(place, config: RunConfig, steps: int = 3) -> tuple[list[float], list[float]]:
    """Return loss and gradient norm of the first steps, without writing anything."""
    trainer = build_trainer(config, place)
    schedules = build_schedules(config.optim, trainer.shards.num_samples)
    loader = training_loader(config, trainer.shards, place)
    accumulation = config.optim.global_batch_size // (config.runtime.micro_batch_size or config.optim.global_batch_size)
    reports = [
        train_step(
            trainer.engine, trainer.teacher, trainer.objective, loader, schedules,
            applied_steps=step, accumulation=accumulation,
        )
        for step in range(steps)
    ]  # fmt: skip
    loader.close()
    return [float(report.loss) for report in reports], [float(report.grad_norm) for report in reports]
