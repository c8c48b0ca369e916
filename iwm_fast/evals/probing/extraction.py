"""Frozen features of labelled samples, from the encoder."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from iwm_fast.evals.datasets import Labelled, batches
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.world_model import WorldModel

Kind = Literal["pooled", "tokens"]
"""The mean over an image's patches, (D,) float32; or all its tokens, (N, D) float16."""


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
    before = None
    for batch in batches(model, shards, samples):
        tokens = model.encode(batch.source_view)
        begun = _Copy(tokens.mean(dim=1) if kind == "pooled" else tokens.half())
        if before is not None:
            yield before.wait()
        before = begun
    if before is not None:
        yield before.wait()


class _Copy:
    """A tensor on its way to the CPU."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor, self._arrived = tensor, None
        if tensor.device.type == "cuda":
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def wait(self) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._tensor


def extract_features(model: WorldModel, part: Labelled) -> Features:
    """Return pooled features and class numbers of the samples, held in memory; waits for no other rank."""
    features = list(encoded(model, part.shards, part.samples, "pooled"))
    return Features(features=torch.cat(features), label=torch.from_numpy(part.number))
