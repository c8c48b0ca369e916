"""Extraction of frozen features of labelled samples with the encoder."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from iwm_fast.evals.datasets import LabelledSamples, evaluation_batches
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime.distributed import RankInfo, all_gather
from iwm_fast.training.loaders import EVALUATION_BATCH_SIZE
from iwm_fast.world_model import WorldModel

Item = TypeVar("Item")

FeatureKind = Literal["pooled", "tokens"]
"""Features of an image: the mean over its patches, (D,), or all its tokens, (N, D). With L layers, D is L times the
encoder's width."""
# Tokens are stored in half precision, because they take N times as much space as pooled features.
DTYPES = {"pooled": np.dtype(np.float32), "tokens": np.dtype(np.float16)}


@dataclass(frozen=True, kw_only=True)
class Features:
    """Frozen, pooled outputs of the encoder with their class numbers."""

    features: Float[Tensor, "images D"]
    label: Int64[Tensor, "images"]


def encode_batches(
    model: WorldModel, shards: ShardSet, samples: Int64[np.ndarray, "samples"], kind: FeatureKind, layers: int = 1
) -> Iterator[Float[Tensor, "B *rest"]]:
    """Yield the features of the samples in batches, in order, on the CPU.

    A batch is copied from a GPU while the next one is encoded.

    Raises:
        ShardError: if an image cannot be decoded, with shard and key.
    """
    copies = (
        _start_copy(model.encode(batch.source_view, layers=layers), kind)
        for batch in evaluation_batches(model, shards, samples)
    )
    for features, copied in prefetch_one(copies):
        if copied is not None:
            copied.synchronize()
        yield features


def _start_copy(
    tokens: Float[Tensor, "B N D"], kind: FeatureKind
) -> tuple[Float[Tensor, "B *rest"], torch.cuda.Event | None]:
    """Start copying features to the CPU, and return the copy and, for tokens on a GPU, the event of its completion."""
    features = tokens.mean(dim=1) if kind == "pooled" else tokens.half()
    if not features.is_cuda:
        return features, None
    # A non-blocking copy to the CPU allocates pinned memory. Its content is undefined until the event has occurred.
    copy, copied = features.to("cpu", non_blocking=True), torch.cuda.Event()
    copied.record()
    return copy, copied


def prefetch_one(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item after the next one has been requested, so that asynchronous work on the next one has started."""
    previous: list[Item] = []
    for item in items:
        yield from previous
        previous = [item]
    yield from previous


def feature_shape(model: WorldModel, kind: FeatureKind, layers: int) -> tuple[int, ...]:
    """Return the shape of one image's features of the last layers."""
    dim = layers * model.config.model.encoder.dim
    return (dim,) if kind == "pooled" else (model.config.grid**2, dim)


def encode_on_all_ranks(
    model: WorldModel, labelled: LabelledSamples, kind: FeatureKind, layers: int, rank_info: RankInfo
) -> Iterator[Float[Tensor, "B *rest"]]:
    """Yield the features of all samples in order on every rank. Collective: every rank must consume all batches.

    Raises:
        ShardError: if an image cannot be decoded, with shard and key.
    """
    size, world_size, samples = EVALUATION_BATCH_SIZE, rank_info.world_size, labelled.samples
    # The last bits of features may depend on the other images of a batch, so batches are the same for any number of
    # ranks, and ranks take turns.
    all_batches = [samples[first : first + size] for first in range(0, len(samples), size)]
    local = all_batches[rank_info.rank :: world_size]
    local_features = encode_batches(model, labelled.shards, np.concatenate(local or [samples[:0]]), kind, layers)
    if world_size == 1:
        yield from local_features
        return
    dtype = getattr(torch, DTYPES[kind].name)
    for first in range(0, len(all_batches), world_size):
        # In the last round some ranks have no batch, or a smaller one; their padding comes last and is cut off.
        padded = torch.zeros(size, *feature_shape(model, kind, layers), dtype=dtype, device=rank_info.device)
        if first + rank_info.rank < len(all_batches):
            features = next(local_features)
            padded[: len(features)] = features
        gathered = all_gather(padded.flatten()).view(-1, *padded.shape[1:]).cpu()
        yield gathered[: len(samples) - first * size]


def extract_features(model: WorldModel, labelled: LabelledSamples, layers: int = 1) -> Features:
    """Return pooled features and class numbers of the samples in memory, computed by this rank alone."""
    features = list(encode_batches(model, labelled.shards, labelled.samples, "pooled", layers))
    return Features(features=torch.cat(features), label=torch.from_numpy(labelled.number))
