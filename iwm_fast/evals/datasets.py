"""Data of the evaluations: shards, labelled samples, and the comparison of a run with its untrained control."""

import gc
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.config.evaluation import EvalDataConfig, KnnConfig, ProbeConfig
from iwm_fast.evals.results import Result, mean_row, name_with_choices, save_result
from iwm_fast.monitoring.evaluation_progress import track_progress
from iwm_fast.pipelines.annotations.labels import Labels, read_labels, require_same_class_names
from iwm_fast.pipelines.bad_samples import error_as_value
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import DataConfig
from iwm_fast.pipelines.errors import ShardError, UndecodableImageError
from iwm_fast.pipelines.image_header import probe
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, on_every_rank
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.sharding import drop_padding, gather_in_order, local_share
from iwm_fast.training.loaders import evaluation_loader, open_named_shards, open_training_shards
from iwm_fast.world_model import WorldModel

# A broken download can damage thousands of images. The rest are only counted.
_MAX_LINES = 20
_READER_THREADS, _HEADERS_AT_A_TIME = 8, 1024


@dataclass(frozen=True, kw_only=True)
class LabelledSamples:
    """A selection of the samples of a shard set, with the labels of the complete set."""

    shards: ShardSet
    labels: Labels
    samples: Int64[np.ndarray, "samples"]
    """Numbers of the selected samples."""

    @property
    def number(self) -> Int64[np.ndarray, "samples"]:
        """Class number of each selected sample."""
        return self.labels.number[self.samples]


class LabelledSets(NamedTuple):
    """Training and validation samples with the same classes."""

    train: LabelledSamples
    val: LabelledSamples

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers."""
        return self.train.labels.classes

    @property
    def chance(self) -> float:
        """Accuracy of uniform guessing."""
        return 1 / len(self.classes)

    @property
    def most_common(self) -> float:
        """Validation accuracy of always predicting the most common class of the training set."""
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
    """Read the labels of both sets and select at most `max_train` and `max_val` samples, evenly spaced; None: all.

    Both sets number the classes alike. `classes` names them; None takes those of the training set.

    Raises:
        ShardError: if a sample has no label, a validation sample has one that no training sample has, or the folders of
            both sets name the class numbers differently.
    """
    # Other labels are compared by value. Only the numbers of .cls may mean other classes in another folder.
    if label == "cls":
        require_same_class_names(train, val)
    train_labels = read_labels(train, label, classes=classes)
    val_labels = read_labels(val, label, classes=train_labels.classes)
    return LabelledSets(
        train=LabelledSamples(shards=train, labels=train_labels, samples=evenly_spaced(train.num_samples, max_train)),
        val=LabelledSamples(shards=val, labels=val_labels, samples=evenly_spaced(val.num_samples, max_val)),
    )


def require_readable(*selections: tuple[ShardSet, Int64[np.ndarray, "_"]]) -> None:
    """Read the headers of all images of an evaluation before the first one is encoded, and name the bad ones together.

    A selection is a set of shards and the numbers of its samples. Shards that `iwm shards check` has decoded are not
    read. Only decoding finds broken pixels, so it may still fail later.

    Raises:
        ShardError: with the reason and the remedy, if headers are bad or images are truncated or too large.
    """
    bad: dict[str, str] = {}
    for shards, samples in selections:
        bad |= {shards.address(sample): reason for sample, reason in _bad_headers(shards, samples)}
    if bad:
        lines = [f"{address} {reason}" for address, reason in list(bad.items())[:_MAX_LINES]]
        more = [f"... and {len(bad) - _MAX_LINES} more"] if len(bad) > _MAX_LINES else []
        remedy = "run `iwm shards check` on these shards to leave the images out"
        problem = f"{len(bad)} images of this evaluation cannot be decoded:"
        raise ShardError(problem, lines=[*lines, *more, remedy])


def _bad_headers(shards: ShardSet, samples: Int64[np.ndarray, "samples"]) -> Iterator[tuple[int, str]]:
    """Yield number and reason of each sample whose header is bad."""
    samples = samples[~shards.is_checked[shards.locate(samples)[0]]]
    probe_header = error_as_value(partial(probe, max_pixels=shards.max_pixels))
    with Reader(shards, _READER_THREADS) as reader:
        for first in range(0, len(samples), _HEADERS_AT_A_TIME):
            some = samples[first : first + _HEADERS_AT_A_TIME]
            for sample, header in zip(some.tolist(), reader.read(some, probe_header), strict=True):
                if isinstance(header, UndecodableImageError):
                    yield sample, str(header)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A run's encoder, its untrained control, and the labelled samples on which both are measured."""

    models: tuple[WorldModel, WorldModel]
    """The run's model, and the same networks before training."""
    sets: LabelledSets

    def report(
        self,
        task: str,
        config: KnnConfig | ProbeConfig,
        correct: Bool[np.ndarray, "images"],
        control: Bool[np.ndarray, "images"],
        *,
        details: dict[str, Any],
        **row_fields: Any,
    ) -> Result:
        """Save and return the accuracy of the run's encoder beside that of the control.

        `correct` and `control` are true for the validation images that are classified correctly with each of them.
        """
        row = mean_row(
            "encoder", "accuracy", correct, config.seed,
            control=control, control_name="untrained encoder", chance=self.sets.chance, **row_fields,
        )  # fmt: skip
        shared = {"num_classes": len(self.sets.classes), "most_common_class": self.sets.most_common}
        result = Result(
            task=task,
            name=name_with_choices(result_name(task, config.data), config, self.models[0].step),
            rows=(row,), step=self.models[0].step, seed=config.seed,
            settings=asdict(config), details=shared | details,
        )  # fmt: skip
        save_result(config.run, result)
        return result


def open_comparison(config: KnnConfig | ProbeConfig, rank_info: RankInfo) -> Comparison:
    """Load the run and open its shards, or those that the settings name. Collective: every rank must call it.

    Raises:
        FileNotFoundError, CheckpointError: if the run or the shards cannot be used.
        ValueError: if no shards are named, patches do not divide `size`, or the encoder has fewer layers.
        ShardError: if a sample has no label, a validation sample has one that no training sample has, or an image
            cannot be decoded.
    """
    with same_error_on_all_ranks():
        model = world_model.load(config.run, rank_info.device, checkpoint=config.checkpoint, size=config.size)
        model.require_layers(config.layers)
        shards = training_shards(model, config.data), validation_shards(model, config.data)
    control = world_model.build_untrained(replace(model.config, seed=config.seed), model.device)

    def read_sets() -> LabelledSets:
        sets = label_sets(*shards, config.data.label, max_train=config.max_train_samples)
        require_readable((sets.train.shards, sets.train.samples), (sets.val.shards, sets.val.samples))
        return sets

    # Labels in .json members and headers require a read of all shards, so only rank 0 reads them.
    sets = broadcast_from_rank_zero(read_sets)
    return Comparison(models=(model, control), sets=sets)


def result_name(task: str, data: EvalDataConfig) -> str:
    """Return the name of a task's result, which contains the label unless that is the default."""
    # Quoted, because names of fields may contain characters that file names may not.
    return task if data.label == "cls" else f"{task}_{quote(data.label, safe='')}"


def validation_shards(model: WorldModel, data: EvalDataConfig) -> ShardSet:
    """Open `data.val` or, if it is unset, the validation shards of the run. Collective: every rank must call it.

    Raises:
        ValueError: if neither names shards.
    """
    spec = data.val or model.config.data.val
    if not spec:
        raise ValueError("data.val must name validation shards, because the run has none")
    own = _run_data(model, data)
    # On one rank, as in training: others would read the same headers and repeat the warnings.
    return broadcast_from_rank_zero(lambda: open_named_shards("data.val", spec, own))


def training_shards(model: WorldModel, data: EvalDataConfig) -> ShardSet:
    """Open `data.train` or, if it is unset, the training samples of the run. Collective: every rank must call it."""
    own = _run_data(model, data)
    if data.train:
        return broadcast_from_rank_zero(lambda: open_named_shards("data.train", data.train, own))
    return broadcast_from_rank_zero(lambda: open_training_shards(own))


def _run_data(model: WorldModel, data: EvalDataConfig) -> DataConfig:
    """Return the data settings of the run, with those that the evaluation sets itself."""
    own = model.config.data
    return replace(own, image=data.image or own.image, max_pixels=data.max_pixels or own.max_pixels)


def evenly_spaced(num_samples: int, count: int | None) -> Int64[np.ndarray, "samples"]:
    """Return at most `count` sample numbers, evenly spaced to represent all shards and classes; None: all."""
    count = num_samples if count is None else min(count, num_samples)
    return np.arange(count, dtype=np.int64) * num_samples // count


def evaluation_batches(
    model: WorldModel,
    shards: ShardSet,
    samples: Int64[np.ndarray, "samples"],
    *,
    leaves_out_bad_samples: bool = False,
) -> Iterator[Batch]:
    """Yield the samples once, in order, with the largest centred square of each image as its unchanged source view.

    Samples that cannot be decoded raise an error, or are left out if `leaves_out_bad_samples` is true.
    """
    loader = evaluation_loader(
        model.config, shards, samples, model.device, leaves_out_bad_samples=leaves_out_bad_samples
    )
    try:
        yield from loader
    finally:
        loader.close()
        # DALI's graph is in a reference cycle, so its memory, a quarter of a GB, stays until the garbage is collected.
        del loader
        if model.config.runtime.loader == "dali":
            gc.collect()


def clean_images(
    model: WorldModel, shards: ShardSet, samples: Int64[np.ndarray, "samples"]
) -> Iterator[tuple[UInt8[Tensor, "H W 3"], int]]:
    """Yield the pixels and the sample number of each sample once, in order, without any photometric change."""
    for batch in evaluation_batches(model, shards, samples):
        pixels = denormalize_view(batch.source_view, model.config.data.normalization)
        yield from zip(pixels, batch.sample.tolist(), strict=True)


def compute_sharded(
    samples: Int64[np.ndarray, "samples"],
    compute: Callable[[Int64[np.ndarray, "share"]], Iterable[Float[Tensor, "*shape"]]],
    shape: tuple[int, ...],
    description: str,
    rank_info: RankInfo,
) -> Float[Tensor, "samples *shape"]:
    """Compute a tensor for each sample, shared among the ranks, and return all of them in order on every rank.

    `compute` yields the tensors of a share of the samples. It must not be collective, because shares differ in size.
    `description` labels the progress bar. Collective: every rank must call it.

    Raises:
        Exception: on the first rank on which `compute` raised, whatever it raised.
        PeerFailedError: on the other ranks, if `compute` raised on any.
    """
    share = local_share(samples, rank_info)
    local = drop_padding(share)
    values = torch.zeros(len(local), *shape, device=rank_info.device)

    def compute_share() -> None:
        for index, value in enumerate(track_progress(compute(local), len(local), description, rank_info)):
            values[index] = value

    on_every_rank(compute_share)
    return gather_in_order(share, values, rank_info)


def tensors_digest(tensors: Iterable[Tensor]) -> str:
    """Return a short digest of tensors, which tells apart the weights of runs with the same number of steps."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
