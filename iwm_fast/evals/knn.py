"""k nearest neighbours on frozen features: no training, so nothing to tune.

Features are the teacher's mean-pooled tokens, centred on the training set's mean and compared by cosine similarity;
each of the k nearest training images votes with weight exp(similarity / temperature).
"""

from dataclasses import asdict, replace
from typing import Any
from urllib.parse import quote

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
from pipelines.labels import read_labels

_QUERIES = 1024


def evaluate_knn(config: KnnConfig) -> dict[str, Any]:
    """Score a run beside its own untrained encoder; write the result.

    Raises:
        ShardError: if a sample has no label, or one that no training sample has.
    """
    model = world_model.load(config.run, choose_device(config.device))
    control = world_model.untrained(replace(model.config, seed=config.seed), model.device)
    train, val = training_shards(model, config.data), validation_shards(model, config.data)
    train_labels = read_labels(train, config.data.label)
    val_labels = read_labels(val, config.data.label, classes=train_labels.classes)
    train_samples = spread(train.num_samples, config.max_train_samples)
    val_samples = spread(val.num_samples, val.num_samples)
    accuracy = []
    for encoder in (model, control):
        bank = extract_features(encoder, train, train_samples, train_labels)
        queries = extract_features(encoder, val, val_samples, val_labels)
        accuracy.append(knn_accuracy(bank, queries, config.num_neighbors, config.temperature))
    result = {
        "knn": accuracy[0],
        "knn_untrained": accuracy[1],
        "knn_chance": 1 / len(train_labels.classes),
        # where classes are of unequal size, what it takes to beat a guess
        "knn_most_common": float((val_labels.number == train_labels.counts.argmax()).mean()),
        "num_train": len(train_samples),
        "num_val": len(val_samples),
        "step": model.step,
        "settings": asdict(config),
    }
    field = quote(config.data.label, safe="")
    save_result(config.run, "knn" if field == "cls" else f"knn_{field}", result)
    return result


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
