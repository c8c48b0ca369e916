"""Shared by the evaluations: shards, labelled samples spread over them, and a run beside its control."""

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.config.evaluation import EvalData, KnnConfig, ProbeConfig
from iwm_fast.evals.results import Result, mean_row, save_result
from iwm_fast.monitoring.evaluation_progress import follow
from iwm_fast.pipelines.annotations.labels import Labels, read_labels
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.sharding import drop_padding, gather_in_order, local_share
from iwm_fast.training.loaders import evaluation_loader, open_named_shards, open_training_shards
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


class LabelledSets(NamedTuple):
    """Samples to learn from and samples to be asked about, with the same classes."""

    train: Labelled
    val: Labelled

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes."""
        return self.train.labels.classes

    @property
    def chance(self) -> float:
        """Share of a guess that takes each class for equally common."""
        return 1 / len(self.classes)

    @property
    def most_common(self) -> float:
        """Share of the validation images in the class that most training images have: what a better guess names."""
        return float((self.val.number == self.train.labels.counts.argmax()).mean())


def label_sets(
    train: ShardSet,
    val: ShardSet,
    label: str,
    *,
    classes: tuple[str, ...] | None = None,
    max_train: int | None = None,
    max_val: int | None = None,
) -> LabelledSets:
    """Return samples of both sets, at most `max_train` and `max_val` of them (None: all), spread over their set.

    Classes are those named, or else what the training set holds, and have the same numbers in both.

    Raises:
        ShardError: if a sample has no label, or a validation sample one that no training sample has.
    """
    known = read_labels(train, label, classes=classes)
    asked = read_labels(val, label, classes=known.classes)
    return LabelledSets(
        train=Labelled(shards=train, labels=known, samples=spread(train.num_samples, max_train)),
        val=Labelled(shards=val, labels=asked, samples=spread(val.num_samples, max_val)),
    )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run's encoder, its control, and the labelled samples that both are measured on."""

    models: tuple[WorldModel, WorldModel]
    """The run's, and the same networks as they are before training."""
    sets: LabelledSets

    def report(
        self,
        task: str,
        config: KnnConfig | ProbeConfig,
        correct: Bool[np.ndarray, "images"],
        control: Bool[np.ndarray, "images"],
        *,
        details: dict[str, Any],
        **cost: Any,
    ) -> Result:
        """Return and save the accuracy on the features of the run's encoder, beside that on those of the control.

        Both are given by whether each validation image is named rightly; `cost` are further fields of the row.
        """
        row = mean_row(
            "encoder",
            "accuracy",
            correct,
            config.seed,
            control=control,
            control_name="untrained encoder",
            chance=self.sets.chance,
            **cost,
        )
        about = {"num_classes": len(self.sets.classes), "most_common_class": self.sets.most_common}
        result = Result(
            task=task,
            name=result_name(task, config.data),
            rows=(row,),
            step=self.models[0].step,
            seed=config.seed,
            settings=asdict(config),
            details=about | details,
        )
        save_result(config.run, result)
        return result


def open_comparison(config: KnnConfig | ProbeConfig, rank_info: RankInfo) -> Comparison:
    """Load the run and open its shards, or those of the settings; collective.

    Raises:
        FileNotFoundError, CheckpointError: if the run or the shards cannot be used.
        ValueError: if no shards are named.
        ShardError: if a sample has no label, or a validation sample one that no training sample has.
    """
    with same_error_on_all_ranks():
        model = world_model.load(config.run, rank_info.device)
        shards = training_shards(model, config.data), validation_shards(model, config.data)
    return Comparison(
        models=(model, world_model.untrained(replace(model.config, seed=config.seed), model.device)),
        # labels in .json members cost a read of all shards: once is enough
        sets=broadcast_from_rank_zero(
            lambda: label_sets(*shards, config.data.label, max_train=config.max_train_samples)
        ),
    )


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
    return open_named_shards("data.val", spec)


def training_shards(model: WorldModel, data: EvalData) -> ShardSet:
    """Open data.train, or what the run was trained on."""
    return open_named_shards("data.train", data.train) if data.train else open_training_shards(model.config.data)


def spread(num_samples: int, count: int | None) -> Int64[np.ndarray, "samples"]:
    """Choose at most `count` samples at equal distances, so that every shard and class has its share; None: all."""
    count = num_samples if count is None else min(count, num_samples)
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


def clean_images(
    model: WorldModel, shards: ShardSet, samples: Int64[np.ndarray, "samples"]
) -> Iterator[tuple[UInt8[Tensor, "H W 3"], int]]:
    """Yield the pixels of the given samples once, untouched, each with the sample's number."""
    for batch in batches(model, shards, samples):
        yield from zip(denormalize_view(batch.source_view), batch.sample.tolist(), strict=True)


def compute_rows(
    samples: Int64[np.ndarray, "samples"],
    rows_of: Callable[[Int64[np.ndarray, "share"]], Iterable[Float[Tensor, "*shape"]]],
    shape: tuple[int, ...],
    what: str,
    rank_info: RankInfo,
) -> Float[Tensor, "samples *shape"]:
    """Return one row of numbers for each sample, in order: each rank computes its share, all return the whole.

    Collective; `rows_of`, which yields the rows of a share, must not be. `what` names the rows on the progress line.
    """
    share = local_share(samples, rank_info)
    local = drop_padding(share)
    rows = torch.zeros(len(local), *shape, device=rank_info.device)
    for place, row in enumerate(follow(rows_of(local), len(local), what, rank_info)):
        rows[place] = row
    return gather_in_order(share, rows, rank_info)


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Return a short name of weights: runs with the same number of steps may have different ones."""
    whole = hashlib.sha256()
    for tensor in tensors:
        whole.update(tensor.cpu().numpy().tobytes())
    return whole.hexdigest()[:16]
