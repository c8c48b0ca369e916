"""Frozen features of labelled samples, from the encoder."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from iwm_fast.evals.datasets import Labelled, batches
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime.distributed import RankInfo, all_gather
from iwm_fast.training.loaders import EVALUATION_BATCH
from iwm_fast.world_model import WorldModel

Item = TypeVar("Item")

Kind = Literal["pooled", "tokens"]
"""The mean over an image's patches, (D,); or all its tokens, (N, D)."""
DTYPES = {"pooled": np.dtype(np.float32), "tokens": np.dtype(np.float16)}


@dataclass(frozen=True, kw_only=True)
class Features:
    """Frozen, pooled encoder outputs and their labels."""

    features: Float[Tensor, "images D"]
    label: Int64[Tensor, "images"]


def encoded(
    model: WorldModel, shards: ShardSet, samples: Int64[np.ndarray, "samples"], kind: Kind
) -> Iterator[Float[Tensor, "B *rest"]]:
    """Yield the samples' features, batch after batch, on the CPU; a GPU goes on with the next batch meanwhile.

    Raises:
        ShardError: if an image cannot be decoded, with shard and key.
    """
    copies = (_begin_copy(model.encode(batch.source_view), kind) for batch in batches(model, shards, samples))
    for features, arrived in one_ahead(copies):
        if arrived is not None:
            arrived.synchronize()
        yield features


def _begin_copy(tokens: Float[Tensor, "B N D"], kind: Kind) -> tuple[Float[Tensor, "B *rest"], torch.cuda.Event | None]:
    """Return features on their way to the CPU, and the event of their arrival if they come from a GPU."""
    features = tokens.mean(dim=1) if kind == "pooled" else tokens.half()
    if not features.is_cuda:
        return features, None
    # into pinned memory
    copy, arrived = features.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()
    return copy, arrived


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield the items, each after the next one has been taken: whatever taking it has begun goes on meanwhile."""
    before: list[Item] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


def row_shape(model: WorldModel, kind: Kind) -> tuple[int, ...]:
    """Return the shape of one image's features."""
    dim = model.config.model.encoder.dim
    return (dim,) if kind == "pooled" else (model.config.grid**2, dim)


def encode_in_order(
    model: WorldModel, part: Labelled, kind: Kind, rank_info: RankInfo
) -> Iterator[Float[Tensor, "B *rest"]]:
    """Yield the features of all samples in order on every rank, each encoded by one of them; collective.

    Ranks take batches of images that are the same for any number of ranks, because a row's last bits may depend on the
    other images of its batch.

    Raises:
        ShardError: if an image cannot be decoded, with shard and key.
    """
    size, world_size, samples = EVALUATION_BATCH, rank_info.world_size, part.samples
    in_batches = [samples[first : first + size] for first in range(0, len(samples), size)]
    local = in_batches[rank_info.rank :: world_size]
    features = encoded(model, part.shards, np.concatenate(local or [samples[:0]]), kind)
    if world_size == 1:
        yield from features
        return
    dtype = getattr(torch, DTYPES[kind].name)
    for first in range(0, len(in_batches), world_size):
        padded = torch.zeros(size, *row_shape(model, kind), dtype=dtype, device=rank_info.device)
        if first + rank_info.rank < len(in_batches):
            rows = next(features)
            padded[: len(rows)] = rows
        gathered = all_gather(padded.flatten()).view(-1, *padded.shape[1:]).cpu()
        yield gathered[: len(samples) - first * size]


def extract_features(model: WorldModel, part: Labelled) -> Features:
    """Return pooled features and class numbers of the samples, held in memory; waits for no other rank."""
    features = list(encoded(model, part.shards, part.samples, "pooled"))
    return Features(features=torch.cat(features), label=torch.from_numpy(part.number))
