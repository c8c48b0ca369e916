"""The schema of the action log: Arrow columns for each sample that training received, and their conversion to arrays.

    step, slot, rank               optimiser step from 0, position in its global batch, rank that trained on it
    sample, planned                `Batch.sample` and `Batch.scheduled_sample`: numbers in the data set
    key, shard, label              name, path of the shard, class number or -1
    crop, flip, source_crop, ...   all random parameters, named as in `Draws`, with source_* and target_* for a view's
    crop_window, source_window     top, left, height, width in pixels of the stored image
    action                         input of the predictor; the metadata name its entries

Random parameters are stored exactly, in the types of `Draws`. A row and the metadata, which are stored in the schema of
every file, suffice to render both views again.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import MAX_PIXELS, MaskConfig
from iwm_fast.pipelines.errors import to_valid_unicode
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.action import action_vector
from iwm_fast.pipelines.transforms.base import Parameters
from iwm_fast.pipelines.transforms.composition import (
    Draws,
    ViewConfig,
    identity_draws,
    identity_parameters,
    views_from_json,
    with_tuples,
)
from iwm_fast.pipelines.transforms.geometry import source_geometry

FORMAT = 1

_METADATA_KEY = "action_log"
_VIEWS = ("source", "target")
_GEOMETRY = ("crop", "flip", "source_crop", "source_flip")
_TENSORS = ("slot", "sample", "scheduled_sample", "label", "crop_window", "source_window")


@dataclass(frozen=True, kw_only=True)
class LogMetadata:
    """The settings that all rows of a file share."""

    views: ViewConfig
    mask: MaskConfig
    seed: int
    grid: int
    """Number of patches along one side of a view."""
    global_batch_size: int
    """Number of rows of a step, over all ranks."""
    shards: str
    """The value of data.train: where the samples were when the run started."""
    shards_digest: str
    """Digest of the samples, from `ShardSet.content_digest`."""
    max_samples: int | None = None
    """The value of data.max_samples: the run used only this many samples, the first ones; None means all."""
    image: str = ""
    """The value of data.image. Logs written before this setting existed lack it."""
    max_pixels: int = MAX_PIXELS
    """The value of data.max_pixels: the run used no larger images."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchRecord:
    """The part of a batch that is logged. It has no tensor on a device, so it keeps no GPU memory alive."""

    step: int
    slot: Int64[Tensor, "B"]
    sample: Int64[Tensor, "B"]
    scheduled_sample: Int64[Tensor, "B"]
    label: Int64[Tensor, "B"]
    key: tuple[str, ...]
    crop_window: Float[Tensor, "B 4"]
    source_window: Float[Tensor, "B 4"]
    draws: Draws

    @staticmethod
    def from_batch(batch: Batch) -> "BatchRecord":
        """Return the record of a batch, which refers to the batch's arrays without a copy."""
        return BatchRecord(**{field.name: getattr(batch, field.name) for field in dataclasses.fields(BatchRecord)})


class RowBuilder:
    """Converts the batches of one rank to rows of the log."""

    def __init__(self, metadata: LogMetadata, shards: ShardSet, rank: int) -> None:
        self._views = metadata.views
        self._shards = shards
        self._rank = rank
        self.schema = row_schema(metadata)

    def build(self, batches: Sequence[BatchRecord]) -> pa.Table:
        """Return the rows of one or more batches, in their order."""
        draws = _concatenate_draws([batch.draws for batch in batches])
        joined = {name: np.concatenate([getattr(batch, name).numpy() for batch in batches]) for name in _TENSORS}
        # The action is computed again from the values that the loader used. The batch's tensor is on the device, and
        # copying it to the host would wait for the GPU.
        geometry = source_geometry(draws, joined["crop_window"], joined["source_window"])
        action = action_vector(draws.source, draws.target, self._views, geometry)
        sizes = [len(batch.key) for batch in batches]
        columns = {
            "step": np.repeat(np.array([batch.step for batch in batches]), sizes),
            "rank": np.full(sum(sizes), self._rank),
            # The column was named before the field of `Batch` was renamed; existing logs must stay readable.
            "planned": joined.pop("scheduled_sample"),
            **joined,
            **_flatten_draws(draws),
            "action": action,
        }
        arrays = {name: _to_arrow(values) for name, values in columns.items()}
        arrays["key"] = _to_arrow_strings([key for batch in batches for key in batch.key])
        arrays["shard"] = self._shard_column(joined["sample"])
        return pa.Table.from_arrays([arrays[field.name].cast(field.type) for field in self.schema], schema=self.schema)

    def _shard_column(self, sample: Int64[np.ndarray, "rows"]) -> pa.DictionaryArray:
        # Parquet stores the dictionary in every row group, so it contains only the paths that occur.
        shard_numbers, _ = self._shards.locate(sample)
        occurring, index = np.unique(shard_numbers, return_inverse=True)
        paths = _to_arrow_strings([self._shards.shards[int(number)].path for number in occurring])
        return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), paths)


def row_schema(metadata: LogMetadata) -> pa.Schema:
    """Return the schema of the rows, which carries the metadata as JSON."""
    draws_types = {
        name: _to_arrow(values).type for name, values in _flatten_draws(identity_draws(metadata.views, 1)).items()
    }
    window = pa.list_(pa.float32(), 4)
    columns = {
        **dict.fromkeys(("step", "slot", "rank"), pa.int32()),
        **dict.fromkeys(("sample", "planned"), pa.int64()),
        "key": pa.string(),
        "shard": pa.dictionary(pa.int32(), pa.string()),
        "label": pa.int64(),
        **draws_types,
        "crop_window": window,
        "source_window": window,
        "action": pa.list_(pa.float32(), len(metadata.views.entries)),
    }
    # The entries of the action are stored separately for programs that do not know `ViewConfig.entries`.
    content = {"format": FORMAT, **dataclasses.asdict(metadata), "action_entries": metadata.views.entries}
    return pa.schema(list(columns.items()), metadata={_METADATA_KEY: json.dumps(content)})


def read_metadata(schema: pa.Schema, views_class: type[ViewConfig] = ViewConfig) -> LogMetadata:
    """Return the metadata that the schema of a file or table carries.

    Raises:
        ValueError: if there is none, or if it has another format.
    """
    content = json.loads((schema.metadata or {}).get(_METADATA_KEY.encode(), b"{}"))
    log_format = content.pop("format", None)
    if log_format != FORMAT:
        raise ValueError(
            f"the action log has format {log_format}, this version of iwm-fast reads only format {FORMAT}; "
            "use the version that wrote the log"
        )
    del content["action_entries"]
    views = views_from_json(content.pop("views"), views_class)
    mask = MaskConfig(**with_tuples(content.pop("mask")))
    return LogMetadata(views=views, mask=mask, **content)


def column(rows: pa.Table, name: str) -> Shaped[np.ndarray, "rows *entries"]:
    """Return a copy of a numeric column as an array; a column of lists becomes two-dimensional."""
    values = rows.column(name).combine_chunks()
    if pa.types.is_fixed_size_list(values.type):
        return np.array(values.flatten()).reshape(len(values), values.type.list_size)
    return np.array(values)


def read_draws(rows: pa.Table, views: ViewConfig) -> Draws:
    """Return the random parameters of these rows, bit for bit as they were drawn."""
    names = identity_parameters(views, 0)
    source, target = ({name: column(rows, f"{view}_{name}") for name in names} for view in _VIEWS)
    return Draws(**{name: column(rows, name) for name in _GEOMETRY}, source=source, target=target)


def _flatten_draws(draws: Draws) -> dict[str, np.ndarray]:
    geometry = {name: getattr(draws, name) for name in _GEOMETRY}
    photometry = {f"{view}_{name}": value for view in _VIEWS for name, value in getattr(draws, view).items()}
    return geometry | photometry


def _concatenate_draws(batches: list[Draws]) -> Draws:
    geometry = {name: np.concatenate([getattr(draws, name) for draws in batches]) for name in _GEOMETRY}
    source, target = (_concatenate_parameters([getattr(draws, view) for draws in batches]) for view in _VIEWS)
    return Draws(**geometry, source=source, target=target)


def _concatenate_parameters(batches: list[Parameters]) -> Parameters:
    return {name: np.concatenate([parameters[name] for parameters in batches]) for name in batches[0]}


def _to_arrow(values: Shaped[np.ndarray, "rows *entries"]) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _to_arrow_strings(texts: list[str]) -> pa.Array:
    # Almost all names are valid Unicode already, so converting each of them would waste time.
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return pa.array([to_valid_unicode(text) for text in texts], pa.string())
