"""Shared by the evaluations: a run beside its control, shards, spread-out labelled samples, frozen features."""

import gc
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import quote

import numpy as np
from jaxtyping import Bool, Int64
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.config.evaluation import EvalData, KnnConfig, ProbeConfig
from iwm_fast.evals.results import Row, accuracy_row
from iwm_fast.pipelines.annotations.labels import Labels, read_labels
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.training.loaders import evaluation_loader, open_training_shards
from iwm_fast.world_model import WorldModel


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Some samples of a set, and the classes of all of it."""

    shards: ShardSet
    labels: Labels
    samples: Int64[np.ndarray, "samples"]

    @property
    def number(self) -> Int64[np.ndarray, "samples"]:
        """Class number of each of the samples."""
        return self.labels.number[self.samples]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run's encoder, its control, and the labelled samples that both are measured on."""

    model: WorldModel
    control: WorldModel
    """The same networks as they are before training."""
    train: Labelled
    val: Labelled

    @property
    def chance(self) -> float:
        """Share of a guess that takes each class for equally common."""
        return 1 / len(self.train.labels.classes)

    @property
    def most_common(self) -> float:
        """Share of the validation images in the class that most training images have: what a better guess names."""
        return float((self.val.number == self.train.labels.counts.argmax()).mean())

    def row(
        self, correct: Bool[np.ndarray, "images"], control: Bool[np.ndarray, "images"], seed: int, **more: Any
    ) -> Row:
        """Return the accuracy of the run's encoder beside the control's, from what is right of each image."""
        return accuracy_row(
            "encoder",
            correct,
            seed,
            control=float(control.mean()),
            control_name="untrained encoder",
            chance=self.chance,
            **more,
        )


def open_comparison(config: KnnConfig | ProbeConfig, rank_info: RankInfo) -> Comparison:
    """Load the run and open its shards, or those of the settings; collective.

    Raises:
        FileNotFoundError, CheckpointError: if the run or the shards cannot be used.
        ValueError: if no shards are named.
        ShardError: if a sample has no label, or a validation sample one that no training sample has.
    """
    with same_error_on_all_ranks():
        model = world_model.load(config.run, rank_info.device)
        train, val = training_shards(model, config.data), validation_shards(model, config.data)
    # labels in .json members cost a read of all shards: once is enough
    known, asked = broadcast_from_rank_zero(lambda: read_both_labels(train, val, config.data.label))
    most = config.max_train_samples or train.num_samples
    return Comparison(
        model=model,
        control=world_model.untrained(replace(model.config, seed=config.seed), model.device),
        train=Labelled(shards=train, labels=known, samples=spread(train.num_samples, most)),
        val=Labelled(shards=val, labels=asked, samples=spread(val.num_samples, val.num_samples)),
    )


def read_both_labels(train: ShardSet, val: ShardSet, label: str) -> tuple[Labels, Labels]:
    """Return the labels of both sets, with classes numbered by the training set.

    Raises:
        ShardError: if a sample has no label, or a validation sample one that no training sample has.
    """
    known = read_labels(train, label)
    return known, read_labels(val, label, classes=known.classes)


def result_name(task: str, data: EvalData) -> str:
    """Return the name of a task's result: each label has its own."""
    return task if data.label == "cls" else f"{task}_{quote(data.label, safe='')}"


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
        # DALI's graph is in a cycle: its memory, a quarter of a GB, would stay until Python clears up
        del loader
        if model.config.runtime.loader == "dali":
            gc.collect()


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Return a short name of weights: runs with the same number of steps may have different ones."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.cpu().numpy().tobytes())
    return whole.hexdigest()[:16]
