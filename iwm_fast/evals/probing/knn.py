"""k nearest neighbours on frozen features: no training, so nothing to tune.

Features are the teacher's mean-pooled tokens, centred on the training set's mean and compared by cosine similarity;
each of the k nearest training images votes with weight exp(similarity / temperature).
"""

import time

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn import functional

from iwm_fast.config.evaluation import KnnConfig
from iwm_fast.evals.datasets import Comparison, LabelledSets, open_comparison
from iwm_fast.evals.probing.extraction import Features, extract_features
from iwm_fast.evals.probing.feature_cache import FeatureCache
from iwm_fast.evals.results import Result
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, single_process
from iwm_fast.world_model import WorldModel

# 256 MB
SIMILARITIES = 2**26


def evaluate_knn(config: KnnConfig, rank_info: RankInfo | None = None) -> Result:
    """Score a run beside its own untrained encoder; write the result; collective.

    Raises:
        FileNotFoundError, CheckpointError: if the run or the shards cannot be used.
        ShardError: if a sample has no label, one that no training sample has, or an image that cannot be decoded.
    """
    rank_info = rank_info or single_process(config.device)
    compared = open_comparison(config, rank_info)
    cache = FeatureCache(config.run, compared.models, rank_info)
    rows = [[cache.rows(model, part, "pooled") for part in compared.sets] for model in compared.models]
    return broadcast_from_rank_zero(lambda: _report(config, compared, rows))


def _report(config: KnnConfig, compared: Comparison, rows: list[list[np.ndarray]]) -> Result:
    begin = time.perf_counter()
    correct, control = (_correct(config, compared, *pair) for pair in rows)
    time_s = time.perf_counter() - begin
    details = {"num_train": len(compared.sets.train.samples)}
    return compared.report("knn", config, correct, control, details=details, time_s=time_s)


def _correct(config: KnnConfig, compared: Comparison, known: np.ndarray, asked: np.ndarray) -> np.ndarray:
    # copies, because torch wants memory that it may write to
    bank, queries = (
        Features(features=torch.from_numpy(np.array(rows)), label=torch.from_numpy(part.number))
        for rows, part in zip((known, asked), compared.sets, strict=True)
    )
    correct = knn_correct(bank, queries, config.num_neighbors, config.temperature, device=compared.models[0].device)
    return correct.numpy()


def knn_accuracy(model: WorldModel, sets: LabelledSets, config: KnnConfig) -> float:
    """Return the share of validation images that their nearest training images name rightly.

    Nothing is cached and no other rank is waited for: this is for evaluation while a run goes on.
    """
    bank, queries = (extract_features(model, part) for part in sets)
    correct = knn_correct(bank, queries, config.num_neighbors, config.temperature, device=model.device)
    return float(correct.double().mean())


def knn_correct(
    bank: Features,
    queries: Features,
    num_neighbors: int,
    temperature: float,
    *,
    device: torch.device | str = "cpu",
    most_similarities: int = SIMILARITIES,
) -> Bool[Tensor, "queries"]:
    """Return of each query whether the weighted vote names its label; so many similarities are held at a time."""
    mean = bank.features.mean(dim=0)
    keys = functional.normalize(bank.features - mean, dim=1).to(device)
    size = max(1, most_similarities // len(keys))
    correct = []
    for features, label in zip(queries.features.split(size), queries.label.split(size), strict=True):
        similarity = functional.normalize(features - mean, dim=1).to(device) @ keys.T
        correct.append(vote(similarity, bank.label, num_neighbors, temperature) == label)
    return torch.cat(correct)


def vote(
    similarity: Float[Tensor, "Q images"], label: Int64[Tensor, "images"], num_neighbors: int, temperature: float
) -> Int64[Tensor, "Q"]:
    """Return each query's class by the weighted vote of its nearest images, on the CPU."""
    nearest, index = similarity.topk(min(num_neighbors, similarity.shape[1]), dim=1)
    # sums on a GPU have no fixed order
    nearest, index = nearest.cpu(), index.cpu()
    # relative to the nearest: the same winner, and no overflow at small temperatures
    weight = ((nearest - nearest[:, :1]) / temperature).exp()
    votes = torch.zeros(len(similarity), int(label.max()) + 1).scatter_add_(1, label[index], weight)
    return votes.argmax(dim=1)
