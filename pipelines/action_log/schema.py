"""What the action log keeps of each sample that training received, as Arrow columns, and the way back to arrays.

    step, slot, rank               optimiser step from 0, place in its global batch, who trained on it
    sample, planned                number in the data set, and what the order had put there (see `Batch`)
    key, shard, label              name, the path it was read from, class number or -1
    crop, flip, source_crop, ...   everything that was drawn, named as in `Draws`; a view's as source_* and target_*
    crop_window, source_window     top, left, height, width in pixels of the stored image
    action                         what the predictor was told; its entries are named in the head

Numbers are float32 as they were drawn. With the head, which every file carries in its schema's metadata, a row is
enough to render both views again.
"""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import MaskConfig, ViewConfig, check
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.action import action_vector
from iwm_fast.pipelines.transforms.geometry import source_geometry
from iwm_fast.pipelines.transforms.parameters import Draws, Photometry, identity_draws

FORMAT = 1

_HEAD = "action_log"
_VIEWS = ("source", "target")
_SHARED = ("crop", "flip", "source_crop", "source_flip")
_PHOTOMETRY = tuple(field.name for field in dataclasses.fields(Photometry))
_NUMBERS = ("slot", "sample", "scheduled_sample", "label", "crop_window", "source_window")


@dataclass(frozen=True, kw_only=True)
class LogMetadata:
    """What holds for every row of a file: the settings that it was drawn with."""

    views: ViewConfig
    mask: MaskConfig
    seed: int
    grid: int
    """Patches along one side of a view."""
    global_batch_size: int
    """Rows of a step, over all ranks."""
    shards: str
    """Where the samples were, as data.train named them."""
    shards_digest: str
    """What they were, see `ShardSet.content_digest`."""
    max_samples: int | None = None
    """How many of them, from the first, were trained on; None: all."""


@dataclass(frozen=True, kw_only=True, eq=False)
class BatchRecord:
    """What a batch leaves to the log: nothing that lies on a device."""

    step: int
    slot: Int64[Tensor, "B"]
    sample: Int64[Tensor, "B"]
    scheduled_sample: Int64[Tensor, "B"]
    label: Int64[Tensor, "B"]
    key: tuple[str, ...]
    crop_window: Float[Tensor, "B 4"]
    source_window: Float[Tensor, "B 4"]
    draws: Draws


def received(batch: Batch) -> BatchRecord:
    """Take from a batch what its rows are made of, without copying."""
    return BatchRecord(**{name: getattr(batch, name) for name in _RECEIVED})


_RECEIVED = tuple(field.name for field in dataclasses.fields(BatchRecord))


class RowBuilder:
    """Turns the batches of one rank into rows."""

    def __init__(self, head: LogMetadata, shards: ShardSet, rank: int) -> None:
        self._views, self._shards, self._rank = head.views, shards, rank
        self.schema = row_schema(head)

    def rows(self, batches: Sequence[BatchRecord]) -> pa.Table:
        """Return the rows of some batches, at least one, in their order."""
        draws = _join_draws([batch.draws for batch in batches])
        joined = {name: np.concatenate([getattr(batch, name).numpy() for batch in batches]) for name in _NUMBERS}
        # on the host, from what the loader made it from: the batch's own lies on the device, and fetching it would wait
        geometry = source_geometry(draws, joined["crop_window"], joined["source_window"])
        action = action_vector(draws.source, draws.target, self._views, geometry)
        sizes = [len(batch.key) for batch in batches]
        columns = {
            "step": np.repeat(np.array([batch.step for batch in batches]), sizes),
            "rank": np.full(sum(sizes), self._rank),
            # the column keeps the name that it has in every log so far
            "planned": joined.pop("scheduled_sample"),
            **joined,
            **_flat(draws),
            "action": action,
        }
        arrays = {name: _array(values) for name, values in columns.items()}
        arrays["key"] = _texts([key for batch in batches for key in batch.key])
        arrays["shard"] = self._shard_column(joined["sample"])
        fields = [(field.name, field.type) for field in self.schema]
        return pa.Table.from_arrays([arrays[name].cast(kind) for name, kind in fields], schema=self.schema)

    def _shard_column(self, sample: Int64[np.ndarray, "rows"]) -> pa.DictionaryArray:
        """Name each path once, and only those that occur: a file repeats its dictionary for every group of rows."""
        number, _ = self._shards.locate(sample)
        occurring, index = np.unique(number, return_inverse=True)
        paths = _texts([self._shards.shards[int(each)].path for each in occurring])
        return pa.DictionaryArray.from_arrays(pa.array(index.astype(np.int32)), paths)


def row_schema(head: LogMetadata) -> pa.Schema:
    """Return the columns, with the head in the metadata."""
    drawn = {name: _array(values).type for name, values in _flat(identity_draws(1)).items()}
    four = pa.list_(pa.float32(), 4)
    columns = {
        **dict.fromkeys(("step", "slot", "rank"), pa.int32()),
        **dict.fromkeys(("sample", "planned"), pa.int64()),
        "key": pa.string(),
        "shard": pa.dictionary(pa.int32(), pa.string()),
        "label": pa.int64(),
        **drawn,
        "crop_window": four,
        "source_window": four,
        "action": pa.list_(pa.float32(), len(head.views.entries)),
    }
    about = {"format": FORMAT, **dataclasses.asdict(head), "action_entries": head.views.entries}
    return pa.schema(list(columns.items()), metadata={_HEAD: json.dumps(about)})


def read_metadata(schema: pa.Schema) -> LogMetadata:
    """Return the head that a file's or a table's schema carries.

    Raises:
        ValueError: if it carries none, or one of another format.
    """
    about = json.loads((schema.metadata or {}).get(_HEAD.encode(), b"{}"))
    found = about.pop("format", None)
    check(found == FORMAT, "the format of the log's rows", found, f"be {FORMAT}; another version may read it")
    # for readers that know nothing of views
    del about["action_entries"]
    views, mask = ViewConfig(**_tuples(about.pop("views"))), MaskConfig(**_tuples(about.pop("mask")))
    return LogMetadata(views=views, mask=mask, **about)


def _tuples(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def column(rows: pa.Table, name: str) -> Shaped[np.ndarray, "rows *entries"]:
    """Return a column of numbers as an array of its own; lists become its second axis."""
    values = rows.column(name).combine_chunks()
    if pa.types.is_fixed_size_list(values.type):
        return np.array(values.flatten()).reshape(len(values), values.type.list_size)
    return np.array(values)


def draws_of(rows: pa.Table) -> Draws:
    """Return what was drawn for these rows, bit for bit."""
    source, target = (Photometry(**{name: column(rows, f"{view}_{name}") for name in _PHOTOMETRY}) for view in _VIEWS)
    return Draws(**{name: column(rows, name) for name in _SHARED}, source=source, target=target)


def to_valid_unicode(text: str) -> str:
    r"""Return a name as valid Unicode: what of a file name is none is written out as \xff."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _flat(draws: Draws) -> dict[str, np.ndarray]:
    shared = {name: getattr(draws, name) for name in _SHARED}
    of_views = {f"{view}_{name}": value for view in _VIEWS for name, value in vars(getattr(draws, view)).items()}
    return shared | of_views


def _join_draws(parts: list[Draws]) -> Draws:
    shared = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _SHARED}
    source, target = (_join_photometry([getattr(part, view) for part in parts]) for view in _VIEWS)
    return Draws(**shared, source=source, target=target)


def _join_photometry(parts: list[Photometry]) -> Photometry:
    return Photometry(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in _PHOTOMETRY})


def _array(values: Shaped[np.ndarray, "rows *entries"]) -> pa.Array:
    if values.ndim == 1:
        return pa.array(values)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _texts(texts: list[str]) -> pa.Array:
    try:
        return pa.array(texts, pa.string())
    except UnicodeEncodeError:
        return pa.array([to_valid_unicode(text) for text in texts], pa.string())
