"""The index of a data set: the samples of all its shards, as columns of one Arrow file.

Processes map the file into memory, so that all processes of a machine share its pages and none holds an object for
each sample. Names become Python strings when they are asked for.

The file holds one record batch with a row for each shard. Its last column is a list of samples: the offsets of the
lists are the numbers of the shards' first samples, and the fields of the lists are the columns of all samples.
"""

import hashlib
import json
import logging
import mmap
import os
import tempfile
import weakref
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from iwm_fast.pipelines.errors import printable
from iwm_fast.pipelines.storage.atomic import name_disk_errors, replace_file
from iwm_fast.pipelines.storage.shard import INTEGER_FIELDS, Shard, StoredStrings

log = logging.getLogger(__name__)

# To be increased when the meaning of the stored values changes.
FORMAT = 1
# While an index is built, a column is held in memory up to this size, and in a temporary file beyond it.
_MAX_IN_MEMORY = 8 * 1024 * 1024

_SAMPLE = pa.struct([*((name, pa.int64()) for name in INTEGER_FIELDS), ("key", pa.large_binary())])
_FIELDS = [
    ("path", pa.large_binary()), ("size_bytes", pa.int64()), ("num_left_out", pa.int64()), ("is_checked", pa.int64()),
    ("samples", pa.large_list(_SAMPLE)),
]  # fmt: skip
# The buffers of these fields in Arrow's order: strings and lists begin with their bounds.
_BUFFERS = (
    "path_bounds", "path", "size_bytes", "num_left_out", "is_checked", "shard_bounds", *INTEGER_FIELDS,
    "key_bounds", "key",
)  # fmt: skip
_BYTES = ("path", "key")


@dataclass(frozen=True, kw_only=True, eq=False)
class DatasetIndex:
    """A data set's index in memory that processes of this machine share."""

    path: str
    """File from which other processes can map it; the kernel provides one for an index that is not on a disk."""
    stamp: str
    """What the index was made from; it has changed if the index is outdated."""
    content_digest: str
    """SHA-256 of keys, image sizes and labels; see `ContentDigest`."""
    num_unlabelled: int
    """Number of samples without a class number."""
    remarks: tuple[str, ...]
    """What the user should know about the shards, such as members that no sample uses."""
    columns: dict[str, np.ndarray]
    """Each buffer of the file as an array, read-only."""

    @property
    def shard_bounds(self) -> Int64[np.ndarray, "bounds"]:
        """Number of each shard's first sample, followed by the total number of samples."""
        return self.columns["shard_bounds"]

    @property
    def paths(self) -> StoredStrings:
        """Path of each shard."""
        return StoredStrings(self.columns["path_bounds"], self.columns["path"])

    @property
    def keys(self) -> StoredStrings:
        """Key of each sample."""
        return StoredStrings(self.columns["key_bounds"], self.columns["key"])

    def shard(self, number: int) -> Shard:
        """Return the part of the index that describes a shard, as views of the columns."""
        return self._shard(number)

    @cached_property
    def _shard(self) -> Callable[[int], Shard]:
        # Threads read the same few shards again and again, sample by sample.
        return lru_cache(maxsize=256)(partial(_view_shard, self.columns))


def _view_shard(columns: dict[str, np.ndarray], number: int) -> Shard:
    begin, end = columns["shard_bounds"][number : number + 2].tolist()
    return Shard(
        path=StoredStrings(columns["path_bounds"], columns["path"])[number],
        size_bytes=int(columns["size_bytes"][number]),
        keys=StoredStrings(columns["key_bounds"], columns["key"])[begin:end],
        num_left_out=int(columns["num_left_out"][number]),
        is_checked=bool(columns["is_checked"][number]),
        **{name: columns[name][begin:end] for name in INTEGER_FIELDS},  # pyright: ignore[reportArgumentType]
    )


class ContentDigest:
    """SHA-256 of keys, image sizes and labels in order; copies of the shards under other paths have the same digest."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, shard: Shard) -> "ContentDigest":
        """Add the samples of the next shard."""
        keys = StoredStrings.of(shard.keys)
        # A fixed width and byte order give the same digest on all machines. The lengths come first, because joined
        # keys alone would not tell ("ab", "c") from ("a", "bc").
        for numbers in ([len(keys)], keys.lengths, shard.image_size, shard.label):
            self._digest.update(np.ascontiguousarray(numbers, "<i8").data)
        self._digest.update(keys.content.data)
        return self

    def text(self) -> str:
        """Return the digest of all shards so far."""
        return self._digest.hexdigest()


class IndexBuilder:
    """Joins the indexes of shards to the index of a data set, with a bounded amount of memory.

    Use it as a context manager, which removes its temporary files.
    """

    def __init__(self) -> None:
        self._columns = {name: _Column() for name in _BUFFERS}
        self._digest = ContentDigest()
        self._num_shards = 0
        self._num_samples = 0
        self._num_unlabelled = 0
        for name in ("path_bounds", "shard_bounds", "key_bounds"):
            self._columns[name].append(np.zeros(1, np.int64))

    def add(self, shard: Shard) -> None:
        """Append the samples of a shard.

        Raises:
            DiskError: if the folder for temporary files has no space.
        """
        self._digest.add(shard)
        self._num_shards += 1
        self._num_samples += len(shard.keys)
        self._num_unlabelled += int((shard.label < 0).sum())
        self._add_strings("path", StoredStrings.of([shard.path]))
        self._add_strings("key", StoredStrings.of(shard.keys))
        numbers = {name: [getattr(shard, name)] for name in ("size_bytes", "num_left_out", "is_checked")}
        numbers |= {name: getattr(shard, name) for name in INTEGER_FIELDS}
        for name, values in (numbers | {"shard_bounds": [self._num_samples]}).items():
            self._columns[name].append(np.asarray(values, np.int64))

    def _add_strings(self, name: str, strings: StoredStrings) -> None:
        bounds = self._columns[name].size_bytes + np.cumsum(strings.lengths)
        self._columns[f"{name}_bounds"].append(bounds)
        self._columns[name].append(strings.content)

    def save(self, path: Path, stamp: str, remarks: list[str]) -> DatasetIndex:
        """Write the index to a file and map it.

        Raises:
            OSError: if it cannot be written.
        """
        content = self._record_batch(stamp, remarks)
        replace_file(path, lambda draft: _write(content, str(draft)))
        index = map_index(str(path), stamp)
        if index is None:
            raise OSError(f"{path} has been changed or removed since it was written")
        return index

    def in_memory(self, stamp: str, remarks: list[str]) -> DatasetIndex:
        """Return the index in shared memory, which ends with this process and those that have mapped it."""
        descriptor = os.memfd_create("iwm-fast-index")
        _write(self._record_batch(stamp, remarks), f"/proc/self/fd/{descriptor}")
        # A path that other processes can open, too.
        index = map_index(f"/proc/{os.getpid()}/fd/{descriptor}", stamp)
        assert index is not None, "written a moment ago"
        weakref.finalize(index, os.close, descriptor)
        return index

    def _record_batch(self, stamp: str, remarks: list[str]) -> pa.RecordBatch:
        buffers: Iterator[pa.Buffer] = (column.buffer() for column in self._columns.values())
        arrays = [_array(kind, self._num_shards, buffers, self._num_samples) for _, kind in _FIELDS]
        about = {
            "format": FORMAT,
            "stamp": stamp,
            "content_digest": self._digest.text(),
            "num_unlabelled": self._num_unlabelled,
            "remarks": remarks,
            "checksums": {name: column.checksum for name, column in self._columns.items()},
        }
        text = json.dumps(about).encode()
        schema = pa.schema(_FIELDS, metadata={"about": text, "checksum": str(zlib.crc32(text))})
        return pa.RecordBatch.from_arrays(arrays, schema=schema)

    def __enter__(self) -> "IndexBuilder":
        return self

    def __exit__(self, *exception: object) -> None:
        for column in self._columns.values():
            column.close()


class _Column:
    """The bytes of a column while it is built."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_MAX_IN_MEMORY)  # noqa: SIM115
        self.size_bytes = 0
        self.checksum = 0

    def append(self, values: np.ndarray) -> None:
        content = np.ascontiguousarray(values).data.cast("B")
        with name_disk_errors(Path(tempfile.gettempdir(), "the index of the data set")):
            self._file.write(content)
        self.size_bytes += len(content)
        self.checksum = zlib.crc32(content, self.checksum)

    def buffer(self) -> pa.Buffer:
        if self.size_bytes <= _MAX_IN_MEMORY:
            self._file.seek(0)
            return pa.py_buffer(self._file.read())
        self._file.flush()
        return pa.py_buffer(mmap.mmap(self._file.fileno(), 0, prot=mmap.PROT_READ))

    def close(self) -> None:
        self._file.close()


def _array(kind: pa.DataType, length: int, buffers: Iterator[pa.Buffer], num_samples: int) -> pa.Array:
    """Return an Arrow array made of the next buffers; a list has `num_samples` values."""
    if pa.types.is_struct(kind):
        children = [_array(field.type, length, buffers, num_samples) for field in kind]
        return pa.StructArray.from_buffers(kind, length, [None], children=children)
    own = [None, next(buffers), *([next(buffers)] if kind == pa.large_binary() else [])]
    children = [_array(kind.value_type, num_samples, buffers, num_samples)] if pa.types.is_large_list(kind) else None
    return pa.Array.from_buffers(kind, length, own, null_count=0, children=children)


def _write(content: pa.RecordBatch, path: str) -> None:
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, content.schema) as writer:
        writer.write_batch(content)


def map_index(path: str, stamp: str, *, is_checked: bool = True) -> DatasetIndex | None:
    """Map an index into memory.

    Args:
        path: the file.
        stamp: what the index must have been made from.
        is_checked: whether all bytes are compared with their checksums, at about 4 GB/s for each core. Processes that
            map an index that another one has just checked can save the time.

    Returns:
        None if the file is absent, outdated or damaged.
    """
    if not os.path.isfile(path):
        return None
    try:
        about, columns = _read(path)
        if about.get("format") != FORMAT or about.get("stamp") != stamp:
            return None
        if is_checked:
            _check(columns, about["checksums"])
        return DatasetIndex(
            path=path,
            stamp=stamp,
            content_digest=about["content_digest"],
            num_unlabelled=about["num_unlabelled"],
            remarks=tuple(about["remarks"]),
            columns=columns,
        )
    # Arrow's errors are ValueError, OSError, KeyError, ... by what it meets.
    except (ValueError, OSError, LookupError, TypeError, NotImplementedError, AttributeError) as error:
        log.warning("%s is not a complete index (%s); it is rebuilt", printable(path), error)
        return None


def _read(path: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return what an index says about itself, and its columns."""
    with pa.memory_map(path) as file:
        reader = pa.ipc.open_file(file)
        metadata = reader.schema.metadata or {}
        text = metadata[b"about"]
        if str(zlib.crc32(text)).encode() != metadata[b"checksum"]:
            raise ValueError("its metadata is damaged")
        batch = reader.get_batch(0)
    buffers = [buffer for column in batch.columns for buffer in column.buffers() if buffer is not None]
    kinds = {name: np.uint8 if name in _BYTES else np.dtype("<i8") for name in _BUFFERS}
    # frombuffer, unlike Arrow, refuses a buffer that is too short for what it should hold.
    arrays = {name: np.frombuffer(buffer, kinds[name]) for name, buffer in zip(_BUFFERS, buffers, strict=True)}
    return json.loads(text), arrays


def _check(columns: dict[str, np.ndarray], checksums: dict[str, int]) -> None:
    """Raise ValueError unless all columns have these checksums."""
    # In threads, because the columns of a large data set take a GB and more.
    with ThreadPoolExecutor(len(columns)) as pool:
        actual = dict(zip(columns, pool.map(zlib.crc32, columns.values()), strict=True))
    damaged = [name for name in columns if actual[name] != checksums[name]]
    if damaged:
        raise ValueError(f"damaged: {', '.join(damaged)}")
