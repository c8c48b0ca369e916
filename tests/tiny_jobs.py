"""A toy that is trained on top of a tiny run: it draws from torch and numpy, and its layers learn at different rates.

It does not draw from Python's generator: beartype, which is in tests only, does so in the threads of loaders and
checkpoints.
"""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from iwm_fast.config import RuntimeConfig
from iwm_fast.evals.config import EvalData
from iwm_fast.evals.tune_config import AugmentConfig, TuneConfig, TuneTask
from iwm_fast.evals.tuning import Job, run_config, tune
from iwm_fast.optim import scaled_optimizer
from pipelines.shards import open_shards
from tiny_runs import tiny_run

# 48 samples, batches of 8
STEPS = 9


class Toy(nn.Module):
    """A classifier of 4 x 4 mean pixels that drops and normalises; three classes."""

    def __init__(self, seed=0, dropout=0.2):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed = nn.Linear(48, 12)
            self.norm = nn.LayerNorm(12)
            self.head = nn.Linear(12, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, inputs):
        return self.head(self.norm(self.dropout(self.embed(inputs["pixels"]))))


def plain_augment(**changes):
    off = {"crop_scale": (0.5, 1.0), "rand_augment": False, "mixup": 0.0, "cutmix": 0.0, "erasing": 0.0}
    return AugmentConfig(**off | changes)


def tiny_task(shards, *, engine="plain", tune=None, augment=None, runtime=None, **changes):
    settings = {"epochs": 1.5, "warmup_epochs": 0.5, "global_batch_size": 8, "lr": 1e-2, "precision": "fp32"}
    return TuneTask(
        data=EvalData(train=shards.pattern, val=shards.pattern),
        tune=TuneConfig(**settings | (tune or {})),
        augment=augment or plain_augment(),
        runtime=RuntimeConfig(**{"device": "cpu", "engine": engine, "loader": "torch"} | (runtime or {})),
        **{"log_every": 3, "checkpoint_every": 4} | changes,
    )


def toy_job(task, config, *, name="toy", dropout=0.2, noise=0.1, watch=lambda batch: None):
    """Return a job; `watch` sees each micro-batch before it is used."""
    module = Toy(dropout=dropout)

    def prepare(batch):
        watch(batch)
        drawn = torch.rand(()) + float(np.random.rand())
        pixels = functional.adaptive_avg_pool2d(batch.source_view, 4).flatten(1)
        return {"pixels": pixels + noise * drawn, "label": batch.label}

    def loss(scores, inputs):
        return functional.cross_entropy(scores, inputs["label"], reduction="sum")

    optim = run_config(task, config, Path("unused")).optim
    scales = {"embed": 0.25, "norm": 0.5, "head": 1.0}
    optimizer = scaled_optimizer(module, optim, lambda parameter: scales[parameter.split(".")[0]])
    return Job(name=name, module=module, prepare=prepare, loss=loss, optimizer=optimizer)


def train_toy(place, shards, folder, task=None, **job):
    """Train a toy in a folder and return it with what that took."""
    task = task or tiny_task(shards)
    config = tiny_run(shards, folder)
    made = toy_job(task, config, **job)
    tuned = tune(made, task, model_config=config, shards=open_shards(shards.pattern), place=place, folder=folder)
    return made.module, tuned


def weights_of(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
