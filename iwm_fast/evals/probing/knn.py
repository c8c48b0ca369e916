"""k-nearest-neighbour classification (k-NN) on frozen features, which needs no training.

Features are the teacher's mean-pooled tokens minus the mean of the training set, compared by cosine similarity. Each of
the k nearest training images votes for its class with weight exp(similarity / temperature).
"""

import time

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from iwm_fast.config.evaluation import KnnConfig
from iwm_fast.evals.datasets import Comparison, open_comparison
from iwm_fast.evals.probing.extraction import Features
from iwm_fast.evals.probing.feature_cache import FeatureCache
from iwm_fast.evals.results import Result
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, single_process

# 256 MB in float32.
MAX_SIMILARITIES = 2**26


def evaluate_knn(config: KnnConfig, rank_info: RankInfo | None = None) -> Result:
    """Measure accuracy beside the untrained encoder and save the result. Collective: every rank must call it.

    Raises:
        FileNotFoundError, CheckpointError: if the run or the shards cannot be used.
        ShardError: if a sample has no label, one that no training sample has, or an image that cannot be decoded.
    """
    rank_info = rank_info or single_process(config.device)
    comparison = open_comparison(config, rank_info)
    cache = FeatureCache(config.run, comparison.models, rank_info)
    features = [
        [cache.rows(model, labelled, "pooled", config.layers) for labelled in comparison.sets]
        for model in comparison.models
    ]
    return broadcast_from_rank_zero(lambda: _report(config, comparison, features))


def _report(config: KnnConfig, comparison: Comparison, features: list[list[np.ndarray]]) -> Result:
    begin = time.perf_counter()
    correct, control = (_classify(config, comparison, *train_and_val) for train_and_val in features)
    time_s = time.perf_counter() - begin
    details = {"num_train": len(comparison.sets.train.samples)}
    return comparison.report("knn", config, correct, control, details=details, time_s=time_s)


def _classify(config: KnnConfig, comparison: Comparison, train: np.ndarray, val: np.ndarray) -> np.ndarray:
    """Return whether each validation image is classified correctly."""
    # The features are copied, because they are mapped read-only and torch requires writable memory.
    bank, queries = (
        Features(features=torch.from_numpy(np.array(features)), label=torch.from_numpy(labelled.number))
        for features, labelled in zip((train, val), comparison.sets, strict=True)
    )
    correct = knn_correct(bank, queries, config.num_neighbors, config.temperature, device=comparison.models[0].device)
    return correct.numpy()


def knn_correct(
    bank: Features,
    queries: Features,
    num_neighbors: int,
    temperature: float,
    *,
    device: torch.device | str = "cpu",
    max_similarities: int = MAX_SIMILARITIES,
) -> Bool[Tensor, "queries"]:
    """Return whether the weighted vote gives each query's label, holding at most `max_similarities` in memory."""
    # Without centring, a large offset that all features share would make all similarities about 1.
    mean = bank.features.mean(dim=0)
    keys = functional.normalize(bank.features - mean, dim=1).to(device)
    size = max(1, max_similarities // len(keys))
    correct = []
    for features, label in zip(queries.features.split(size), queries.label.split(size), strict=True):
        similarity = functional.normalize(features - mean, dim=1).to(device) @ keys.T
        correct.append(vote(similarity, bank.label, num_neighbors, temperature) == label)
    return torch.cat(correct)


def vote(
    similarity: Float[Tensor, "Q images"], label: Int64[Tensor, "images"], num_neighbors: int, temperature: float
) -> Int64[Tensor, "Q"]:
    """Return the class of each query by the weighted vote of its nearest images, on the CPU."""
    nearest, index = similarity.topk(min(num_neighbors, similarity.shape[1]), dim=1)
    # On a GPU, scatter_add_ sums in no fixed order, which could decide close votes differently.
    nearest, index = nearest.cpu(), index.cpu()
    # Relative to the nearest image the votes have the same winner, and do not overflow at small temperatures.
    weight = ((nearest - nearest[:, :1]) / temperature).exp()
    votes = torch.zeros(len(similarity), int(label.max()) + 1).scatter_add_(1, label[index], weight)
    return votes.argmax(dim=1)
