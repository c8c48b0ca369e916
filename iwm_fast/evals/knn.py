"""k nearest neighbours on frozen features: no training, so nothing to tune.

Features are the teacher's mean-pooled tokens, centred on the training set's mean and compared by cosine similarity;
each of the k nearest training images votes with weight exp(similarity / temperature).
"""

from dataclasses import asdict, dataclass, replace
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from iwm_fast import world_model
from iwm_fast.distributed import choose_device
from iwm_fast.evals.config import KnnConfig
from iwm_fast.evals.features import (
    Features,
    extract_features,
    save_result,
    spread,
    training_shards,
    validation_shards,
)
from iwm_fast.world_model import WorldModel
from pipelines.labels import Labels, read_labels
from pipelines.shards import ShardSet

_QUERIES = 1024


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Some samples of a set, and the classes of all of it."""

    shards: ShardSet
    labels: Labels
    samples: Int64[np.ndarray, "samples"]


def evaluate_knn(config: KnnConfig) -> dict[str, Any]:
    """Score a run beside its own untrained encoder; write the result.

    Raises:
        ShardError: if a sample has no label, or one that no training sample has.
    """
    model = world_model.load(config.run, choose_device(config.device))
    control = world_model.untrained(replace(model.config, seed=config.seed), model.device)
    train, val = training_shards(model, config.data), validation_shards(model, config.data)
    bank, queries = labelled_samples(train, val, config)
    accuracy, control_accuracy = knn_accuracies([model, control], bank, queries, config)
    result = {
        "knn": accuracy,
        "knn_untrained": control_accuracy,
        "knn_chance": 1 / len(bank.labels.classes),
        # where classes are of unequal size, what it takes to beat a guess
        "knn_most_common": float((queries.labels.number == bank.labels.counts.argmax()).mean()),
        "num_train": len(bank.samples),
        "num_val": len(queries.samples),
        "step": model.step,
        "settings": asdict(config),
    }
    field = quote(config.data.label, safe="")
    save_result(config.run, "knn" if field == "cls" else f"knn_{field}", result)
    return result


def labelled_samples(
    train: ShardSet, val: ShardSet, config: KnnConfig, max_val_samples: int | None = None
) -> tuple[Labelled, Labelled]:
    """Return the samples to vote and to be named, spread over their sets, with classes numbered by the first.

    Raises:
        ShardError: if a sample has no label, or one that no training sample has.
    """
    labels = read_labels(train, config.data.label)
    val_labels = read_labels(val, config.data.label, classes=labels.classes)
    samples = spread(train.num_samples, config.max_train_samples)
    val_samples = spread(val.num_samples, max_val_samples or val.num_samples)
    return (
        Labelled(shards=train, labels=labels, samples=samples),
        Labelled(shards=val, labels=val_labels, samples=val_samples),
    )


def knn_accuracies(models: list[WorldModel], bank: Labelled, queries: Labelled, config: KnnConfig) -> list[float]:
    """Return for each model the share of queries that their nearest samples of the bank name rightly."""
    accuracies = []
    for model in models:
        known, asked = (extract_features(model, part.shards, part.samples, part.labels) for part in (bank, queries))
        accuracies.append(knn_accuracy(known, asked, config.num_neighbors, config.temperature))
    return accuracies


def knn_accuracy(bank: Features, queries: Features, num_neighbors: int, temperature: float) -> float:
    """Return the share of queries whose weighted vote names their label."""
    mean = bank.features.mean(dim=0)
    keys = functional.normalize(bank.features - mean, dim=1)
    right = 0
    chunks = zip(queries.features.split(_QUERIES), queries.label.split(_QUERIES), strict=True)
    for features, label in chunks:
        similarity = functional.normalize(features - mean, dim=1) @ keys.T
        voted = vote(similarity, bank.label, num_neighbors, temperature)
        right += int((voted == label).sum())
    return right / len(queries.label)


def vote(
    similarity: Float[Tensor, "Q images"], label: Int64[Tensor, "images"], num_neighbors: int, temperature: float
) -> Int64[Tensor, "Q"]:
    """Return each query's class by the weighted vote of its nearest images."""
    nearest, index = similarity.topk(min(num_neighbors, similarity.shape[1]), dim=1)
    # relative to the nearest: the same winner, and no overflow at small temperatures
    weight = ((nearest - nearest[:, :1]) / temperature).exp()
    votes = torch.zeros(len(similarity), int(label.max()) + 1).scatter_add_(1, label[index], weight)
    return votes.argmax(dim=1)
