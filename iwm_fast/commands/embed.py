"""`iwm embed`: write the features of images, one row per image, as a Parquet or NumPy file.

Image files need neither DALI nor shards. A `.npz` file does not need pyarrow either, but is collected in memory.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor, cat

from iwm_fast import world_model
from iwm_fast.config.commands import EmbedConfig
from iwm_fast.monitoring.evaluation_progress import track_progress
from iwm_fast.pipelines.errors import printable, to_valid_unicode
from iwm_fast.pipelines.storage.atomic import replace_file
from iwm_fast.pipelines.storage.image_folder import find_images
from iwm_fast.runtime.distributed import single_process
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)

_BATCH_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """The outcome of `embed`."""

    path: Path
    """The file that was written."""
    num_images: int
    """Number of its rows."""
    num_left_out: int
    """Number of images that could not be read."""
    shape: tuple[int, ...]
    """Shape of one feature: (dim,), or (patches, dim) without pooling. Parquet stores it flat."""

    def __str__(self) -> str:
        left_out = f", {self.num_left_out} could not be read and are left out" if self.num_left_out else ""
        return f"{self.path}: {self.num_images} images, features of {' x '.join(map(str, self.shape))}{left_out}"


@dataclass(frozen=True, kw_only=True)
class _Rows:
    """The rows of one batch."""

    columns: dict[str, list[Any]]
    """Name of each image, and its label if there are labels."""
    feature: Float[np.ndarray, "images values"]
    num_left_out: int


class _CountedRows:
    """An iterator over batches that counts their images. It raises ValueError at the end if there is no image."""

    def __init__(self, rows: Iterable[_Rows]) -> None:
        self._rows = rows
        self.num_images = 0
        self.num_left_out = 0

    def __iter__(self) -> Iterator[_Rows]:
        for batch in self._rows:
            self.num_images += len(batch.feature)
            self.num_left_out += batch.num_left_out
            if len(batch.feature):
                yield batch
        if not self.num_images:
            raise ValueError(f"none of the {self.num_left_out} images can be read, so that nothing is written")


def embed(config: EmbedConfig) -> Embedding:
    """Write one row per image with its name, its label if it has one, and its feature.

    Raises:
        FileExistsError: if the file exists.
        FileNotFoundError, CheckpointError, ShardError: if the run, the images or the shards cannot be used.
        ValueError: if none of the images can be read, or neither the run nor the settings name shards.
    """
    path = Path(config.to)
    if path.exists():
        raise FileExistsError(f"{path} exists already; nothing is overwritten: remove it or choose another file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"to={path} must lie in a folder that exists, got {path.parent}")
    device = single_process(config.device).device
    model = world_model.load(config.run, device, checkpoint=config.checkpoint, size=config.size)
    dim, num_patches = model.config.model.encoder.dim, model.config.grid**2
    shape = (dim,) if config.pool == "mean" else (num_patches, dim)
    metadata = {
        "run": Path(config.run).resolve().name,
        "step": model.step,
        "pool": config.pool,
        "size": model.config.views.size,
        "num_patches": num_patches,
        "dim": dim,
        "label_field": config.data.label,
    }
    rows = _CountedRows(_file_rows(model, config) if config.images else _shard_rows(model, config))
    write = _write_npz if path.suffix == ".npz" else _write_parquet
    replace_file(path, lambda draft: write(draft, rows, shape, metadata))
    return Embedding(path=path, num_images=rows.num_images, num_left_out=rows.num_left_out, shape=shape)


def _feature(model: WorldModel, view: Float[Tensor, "B 3 H W"], pool: str) -> Float[np.ndarray, "B values"]:
    tokens = model.encode(view)
    return (tokens.mean(dim=1) if pool == "mean" else tokens.flatten(1)).float().cpu().numpy()


def _file_rows(model: WorldModel, config: EmbedConfig) -> Iterator[_Rows]:
    """Yield the rows of image files, named by their paths in the folder."""
    source = Path(config.images)
    paths, root = find_images(source), source.parent if source.is_file() else source
    evaluation_batches = [paths[first : first + _BATCH_SIZE] for first in range(0, len(paths), _BATCH_SIZE)]
    with ThreadPoolExecutor(thread_name_prefix="images") as pool:
        for batch in track_progress(evaluation_batches, len(evaluation_batches), "batches encoded"):
            views = list(pool.map(lambda path: _read(model, path, config.data.max_pixels), batch))
            read = [path for path, view in zip(batch, views, strict=True) if view is not None]
            names = [to_valid_unicode(path.relative_to(root).as_posix()) for path in read]
            good = [view for view in views if view is not None]
            feature = _feature(model, cat(good), config.pool) if good else np.empty((0, 0), np.float32)
            yield _Rows(columns={"path": names}, feature=feature, num_left_out=len(batch) - len(good))


def _read(model: WorldModel, path: Path, max_pixels: int | None) -> Float[Tensor, "1 3 H W"] | None:
    try:
        return model.load_image(path, max_pixels=max_pixels)
    except (OSError, ValueError) as error:
        log.warning("%s; it is left out", printable(str(error)))
        return None


def _shard_rows(model: WorldModel, config: EmbedConfig) -> Iterator[_Rows]:
    """Yield the rows of the samples of shards, named by their keys."""
    # Imported here, because image files need none of the packages that shards need.
    from iwm_fast.evals.datasets import evaluation_batches, validation_shards  # noqa: PLC0415
    from iwm_fast.training.loaders import EVALUATION_BATCH_SIZE  # noqa: PLC0415

    shards = validation_shards(model, config.data)
    labels = _labels(shards, config.data.label)
    loaded = evaluation_batches(model, shards, np.arange(shards.num_samples), leaves_out_bad_samples=True)
    for batch in track_progress(loaded, math.ceil(shards.num_samples / EVALUATION_BATCH_SIZE), "batches encoded"):
        # Another sample replaces one that cannot be decoded.
        is_good = batch.sample == batch.scheduled_sample
        samples = batch.sample[is_good].tolist()
        columns = {"key": [to_valid_unicode(shards.key(sample)) for sample in samples]}
        if labels is not None:
            columns["label"] = [labels[sample] for sample in samples]
        feature = _feature(model, batch.source_view, config.pool)[is_good.numpy()]
        yield _Rows(columns=columns, feature=feature, num_left_out=len(is_good) - len(samples))


def _labels(shards: Any, field: str) -> list[int | str | None] | None:
    """Return the label of each sample, None for a sample without one; None if no sample has one."""
    from iwm_fast.pipelines.annotations.labels import read_labels  # noqa: PLC0415

    if field != "cls":
        labels = read_labels(shards, field)
        return [labels.classes[number] for number in labels.number]
    numbers = shards.labels(np.arange(shards.num_samples)).tolist()
    return [None if number < 0 else number for number in numbers] if max(numbers) >= 0 else None


def _write_parquet(path: Path, rows: _CountedRows, shape: tuple[int, ...], metadata: dict[str, Any]) -> None:
    """Write the rows as they come; each feature is a fixed-size list of float32."""
    # Imported here, because a `.npz` file can be written without it.
    import pyarrow as pa  # noqa: PLC0415
    from pyarrow import parquet  # noqa: PLC0415

    feature_type = pa.list_(pa.float32(), math.prod(shape))
    label_type = pa.int64() if metadata["label_field"] == "cls" else pa.string()
    text = {name: str(value) for name, value in metadata.items()}
    with ExitStack() as stack:
        writer: Any = None
        for batch in rows:
            types = {name: label_type if name == "label" else pa.string() for name in batch.columns}
            schema = pa.schema(types | {"feature": feature_type}, metadata=text)
            feature = pa.FixedSizeListArray.from_arrays(pa.array(batch.feature.ravel()), type=feature_type)
            writer = writer or stack.enter_context(parquet.ParquetWriter(path, schema))
            writer.write_table(pa.table({**batch.columns, "feature": feature}, schema=schema))


def _write_npz(path: Path, rows: _CountedRows, shape: tuple[int, ...], metadata: dict[str, Any]) -> None:
    """Write arrays by name: the columns, and feature as (images, dim) or (images, patches, dim)."""
    evaluation_batches = list(rows)
    columns: dict[str, Any] = {name: [] for name in evaluation_batches[0].columns}
    for batch in evaluation_batches:
        for name, values in batch.columns.items():
            # NumPy could store None only as a pickle.
            columns[name] += [-1 if value is None else value for value in values]
    feature = np.concatenate([batch.feature for batch in evaluation_batches]).reshape(-1, *shape)
    arrays: dict[str, Any] = metadata | columns | {"feature": feature}
    # Given a path, NumPy would append .npz to the name of the temporary file.
    with path.open("wb") as file:
        np.savez(file, **arrays)
