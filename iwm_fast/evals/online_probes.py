"""Features and probes of the evaluation during training, on the same few images every time.

Linear and attentive probe are trained from scratch at each evaluation, on the features that k-NN needs anyway. A buffer
of recent training features would cost no encoding, but it would mix encoders of different steps and images that were
cropped, changed and masked, so that its accuracy would not be that of any checkpoint.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Float16, Int64
from torch import Tensor

from iwm_fast.config.evaluation import AttentiveConfig, KnnConfig, LinearConfig, ProbeConfig
from iwm_fast.evals.datasets import LabelledSets, clean_images, compute_sharded, evaluation_batches
from iwm_fast.evals.probing.attentive import AttentiveGrid
from iwm_fast.evals.probing.extraction import Features, feature_shape
from iwm_fast.evals.probing.feature_batches import FeatureDataset
from iwm_fast.evals.probing.head_grid import DivergenceError
from iwm_fast.evals.probing.knn import knn_correct
from iwm_fast.evals.probing.linear import LinearGrid
from iwm_fast.evals.probing.probe import BuildGrid, probe
from iwm_fast.evals.retrieval.bank import draw_bank
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.runtime.distributed import RankInfo, on_every_rank
from iwm_fast.runtime.sharding import drop_padding, gather_in_order, local_share
from iwm_fast.world_model import WorldModel

KNN = KnnConfig(max_train_samples=2000)
# With fewer training images, none are left to choose between the learning rates.
MIN_PROBE_IMAGES = 10
# On the demo's model, three times as many epochs or learning rates changed accuracies by less than their interval.
_LINEAR = LinearConfig(epochs=20, batch_size=256, lrs=(1e-1, 1e-2), weight_decays=(0.0,))
_ATTENTIVE = AttentiveConfig(epochs=10, lrs=(1e-2, 3e-3))
_VIEWS_PER_IMAGE = 8


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """Outputs of an encoder for some images, on the CPU."""

    pooled: Float[Tensor, "images D"]
    tokens: Float16[Tensor, "images N D"] | None
    """All tokens, for the attentive probe; 0.3 MB an image for a ViT-B/16. None if they are not needed."""

    @property
    def is_finite(self) -> bool:
        """Whether all values are finite, also in half precision."""
        return all(bool(values.isfinite().all()) for values in (self.pooled, self.tokens) if values is not None)


def encode_images(
    model: WorldModel,
    shards: ShardSet,
    samples: Int64[np.ndarray, "samples"],
    rank_info: RankInfo,
    *,
    keep_tokens: bool,
) -> EncodedImages:
    """Return the outputs for these samples on every rank; each encodes its share. Collective."""
    share = local_share(samples, rank_info)
    local = drop_padding(share)
    num_tokens, dim = feature_shape(model, "tokens", layers=1)
    # On the model's device, because NCCL gathers nothing else. Between steps, the memory of activations is free there.
    pooled = torch.zeros(len(local), dim, device=model.device)
    tokens = torch.zeros(len(local), num_tokens if keep_tokens else 0, dim, dtype=torch.half, device=model.device)

    def encode_share() -> None:
        end = 0
        for batch in evaluation_batches(model, shards, local):
            output = model.encode(batch.source_view)
            start, end = end, end + len(output)
            pooled[start:end] = output.mean(dim=1)
            tokens[start:end] = output[:, : tokens.shape[1]]

    on_every_rank(encode_share)
    gathered = gather_in_order(share, tokens, rank_info).cpu() if keep_tokens else None
    return EncodedImages(pooled=gather_in_order(share, pooled, rank_info).cpu(), tokens=gathered)


def encode_changed_views(
    model: WorldModel, shards: ShardSet, samples: Int64[np.ndarray, "samples"], rank_info: RankInfo, family: str
) -> Float[Tensor, "samples views D"]:
    """Return the pooled features of 8 versions of each sample, changed by a family as strongly as in training.

    On every rank; each encodes its share. Collective.
    """

    def encode_share(local: Int64[np.ndarray, "share"]) -> Iterator[Float[Tensor, "views D"]]:
        for pixels, sample in clean_images(model, shards, local):
            bank = draw_bank(pixels, sample, _VIEWS_PER_IMAGE, model=model, strengths="run", seed=0, family=family)
            yield model.encode(normalize_view(bank.pixels, model.config.data.normalization)).mean(dim=1)

    shape = _VIEWS_PER_IMAGE, *feature_shape(model, "pooled", layers=1)
    return compute_sharded(samples, encode_share, shape, "images changed", rank_info)


def accuracies(model: WorldModel, sets: LabelledSets, train: EncodedImages, val: EncodedImages) -> dict[str, float]:
    """Return the accuracy of k-NN and, with enough training images, of both probes; NaN if a feature is not finite."""
    has_probes = train.tokens is not None
    if not (train.is_finite and val.is_finite):
        return dict.fromkeys(("knn", "linear", "attentive") if has_probes else ("knn",), math.nan)
    bank, queries = (
        Features(features=encoded.pooled, label=torch.from_numpy(labelled.number))
        for encoded, labelled in zip((train, val), sets, strict=True)
    )
    correct = knn_correct(bank, queries, KNN.num_neighbors, KNN.temperature, device=model.device)
    measured = {"knn": float(correct.double().mean())}
    if has_probes:
        pooled, tokens = ([getattr(encoded, kind) for encoded in (train, val)] for kind in ("pooled", "tokens"))
        attentive = partial(AttentiveGrid, seed=_ATTENTIVE.seed)
        measured["linear"] = _probe_accuracy(model.device, sets, pooled, LinearGrid, _LINEAR)
        measured["attentive"] = _probe_accuracy(model.device, sets, tokens, attentive, _ATTENTIVE)
    return measured


def _probe_accuracy(
    device: torch.device, sets: LabelledSets, features: list[Tensor], build: BuildGrid, config: ProbeConfig
) -> float:
    train, val = (
        FeatureDataset(features=values.numpy(), label=labelled.number, indices=np.arange(len(values)), device=device)
        for values, labelled in zip(features, sets, strict=True)
    )
    try:
        return float(probe(train, val, len(sets.classes), build, config).correct.mean())
    # This must not end the run that is measured.
    except DivergenceError:
        return math.nan
