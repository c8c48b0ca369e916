"""Shards of painted regions: what an image shows says what each pixel's class is."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from iwm_fast.config import PredictorConfig, RuntimeConfig
from iwm_fast.evals.tune_config import TuneConfig
from iwm_fast.loop import run
from samples import TinyShards, encode, write_tar
from tiny_runs import tiny_run

COLOURS = np.array([(30, 30, 30), (220, 60, 40), (40, 190, 70), (50, 80, 230)], np.uint8)
"""Of the classes, in the order of their numbers."""
NAMES = ("dark", "red", "green", "blue")
IGNORED = 255


def painted(path: Path, count: int, *, seed: int, classes: int = 4, has_masks: bool = True) -> str:
    """Write a shard of images of two halves of two classes each, whose upper and lower rims are ignored.

    `cls` is the class of the left half, json.right the name of the right one's; json.red and json.blue say whether that
    is the colour of any.
    """
    generator, content = np.random.default_rng(seed), []
    for number in range(count):
        height, width = generator.integers(40, 80, 2)
        left, right = generator.permutation(classes)[:2]
        mask = np.full((height, width), left, np.uint8)
        mask[:, width // 2 :] = right
        pixels = np.clip(COLOURS[mask] + generator.normal(0, 4, (height, width, 3)), 0, 255).astype(np.uint8)
        mask[:2], mask[-2:] = IGNORED, IGNORED
        note = {"right": NAMES[right], "red": 1 in (left, right), "blue": 3 in (left, right)}
        parts = {"jpg": encode(pixels), "cls": str(left).encode(), "json": json.dumps(note).encode()}
        parts |= {"seg.png": encode(mask, "PNG")} if has_masks else {}
        content += [(f"{number:04}.{end}", part) for end, part in parts.items()]
    write_tar(path, content)
    return str(path)


def painted_run(folder: Path, *, num_train: int = 48, num_val: int = 18, depth: int = 1) -> str:
    """Write both sets and train for a moment; return the run's folder."""
    folder.mkdir(exist_ok=True)
    train, val = painted(folder / "train.tar", num_train, seed=0), painted(folder / "val.tar", num_val, seed=1)
    config = tiny_run(TinyShards(pattern=train, folder=folder), folder / "run", loader="torch")
    predictor = PredictorConfig(dim=16, depth=depth, num_heads=1)
    run(
        replace(
            config,
            data=replace(config.data, val=val),
            model=replace(config.model, predictor=predictor),
            optim=replace(config.optim, epochs=1.0, warmup_epochs=0.0),
        )
    )
    return str(folder / "run")


def tuning(**changes) -> dict:
    """Return settings of a task that trains for a moment: its groups tune and runtime."""
    tune = {"epochs": 4.0, "warmup_epochs": 0.0, "global_batch_size": 8, "lr": 1e-2, "encoder_lr": 3e-3}
    tune |= {"pretrained_lr_factor": 1.0, "precision": "fp32", "drop_path": 0.0}
    runtime = {name: changes.pop(name) for name in ("micro_batch_size", "engine", "zero_stage") if name in changes}
    runtime = {"device": "cpu", "engine": "plain", "loader": "torch", **runtime}
    return {"tune": TuneConfig(**tune | changes), "runtime": RuntimeConfig(**runtime)}
