"""Shared by the evaluations: shards of a run, spread-out samples, pooled frozen features."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from iwm_fast.data import evaluation_loader, open_training_shards
from iwm_fast.evals.config import EvalData
from iwm_fast.world_model import WorldModel
from pipelines.batch import Batch
from pipelines.labels import Labels
from pipelines.shards import ShardSet, open_shards


@dataclass(frozen=True, kw_only=True)
class Features:
    """Frozen, pooled encoder outputs and their labels."""

    features: Float[Tensor, "images D"]
    label: Int64[Tensor, "images"]


def validation_shards(model: WorldModel, data: EvalData) -> ShardSet:
    """Open data.val, or the run's.

    Raises:
        ValueError: if neither names shards.
    """
    spec = data.val or model.config.data.val
    if not spec:
        raise ValueError("data.val must name validation shards: neither the run nor the command line does")
    return open_shards(spec)


def training_shards(model: WorldModel, data: EvalData) -> ShardSet:
    """Open data.train, or what the run was trained on."""
    return open_shards(data.train) if data.train else open_training_shards(model.config.data)


def spread(num_samples: int, count: int) -> Int64[np.ndarray, "samples"]:
    """Choose at most `count` samples at equal distances, so that every shard and class has its share."""
    count = min(count, num_samples)
    return np.arange(count, dtype=np.int64) * num_samples // count


def batches(model: WorldModel, shards: ShardSet, samples: Int64[np.ndarray, "samples"]) -> Iterator[Batch]:
    """Yield the given samples once, untouched."""
    loader = evaluation_loader(model.config, shards, samples, model.device)
    try:
        yield from loader
    finally:
        loader.close()


def extract_features(
    model: WorldModel, shards: ShardSet, samples: Int64[np.ndarray, "samples"], labels: Labels
) -> Features:
    """Return mean-pooled tokens of the teacher, and the samples' class numbers."""
    features, number = [], []
    for batch in batches(model, shards, samples):
        features.append(model.encode(batch.source_view).mean(dim=1).cpu())
        number.append(labels.of(batch.sample))
    return Features(features=torch.cat(features), label=torch.cat(number))


def save_result(run: str, name: str, result: dict[str, Any]) -> Path:
    """Write an evaluation's numbers into the run folder; the same evaluation of a later checkpoint replaces it."""
    path = Path(run) / "evaluations" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return draft.replace(path)
