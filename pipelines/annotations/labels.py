"""Labels of samples as class numbers, read from the `.cls` member or from a field of the `.json` member.

Loaders do not handle labels. An evaluation reads its labels once and looks them up by the sample numbers of a batch, so
that several label fields can share one stream of batches.
"""

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from iwm_fast.pipelines.config import require_label_field
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard import Shard, require_unchanged
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.storage.tar_reader import REMOTE_STEP, ShardFile

# Members closer than this are read in one request: about what a disk or a network folder transfers in the time of
# another request. REMOTE_STEP is the corresponding size for a remote store.
_LOCAL_GAP = 128 * 1024
# Each thread holds at most this much.
_MAX_READ = 8 * 1024 * 1024
_MAX_LISTED_CLASSES = 20
log = logging.getLogger(__name__)
_TYPE_NAMES = {str: "string", int: "integer", bool: "boolean"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """One label field of all samples of a set."""

    field: str
    """The field: "cls" or "json.NAME"."""
    number: Int64[np.ndarray, "samples"]
    """Class number of each sample of the set, 0 .. K - 1."""
    classes: tuple[str, ...]
    """Name of each class: its value in the shards, as text."""

    @property
    def counts(self) -> Int64[np.ndarray, "K"]:
        """Number of samples of each class, 0 for a class that occurs only in other sets."""
        return np.bincount(self.number, minlength=len(self.classes)).astype(np.int64)

    @property
    def digest(self) -> str:
        """SHA-256 of the classes and of the class number of each sample."""
        names = json.dumps(self.classes).encode()
        # A fixed width and byte order give the same digest on all machines.
        return hashlib.sha256(names + self.number.astype("<i8").tobytes()).hexdigest()

    def of(self, sample: Int64[Tensor, "B"]) -> Int64[Tensor, "B"]:
        """Return the class numbers of a batch with these sample numbers."""
        return torch.from_numpy(self.number[sample.numpy()])


class _Value(NamedTuple):
    type_name: str
    """Compared before the value, because Python treats True and 1 as equal."""
    value: str | int

    @property
    def text(self) -> str:
        return self.value if isinstance(self.value, str) else json.dumps(self.value)

    def __str__(self) -> str:
        return f"{self.type_name} {json.dumps(self.value, ensure_ascii=False)}"


def read_labels(shards: ShardSet, field: str, *, classes: Sequence[str] | None = None, num_threads: int = 8) -> Labels:
    """Read a label field of all samples and number its distinct values in sorted order.

    Integers sort as numbers, so that values which already are 0 .. K - 1 do not change.

    Args:
        shards: the samples.
        field: "cls", "json.NAME" for a field of the `.json` members, or "json.NAME.NAME" for a nested field.
        classes: class names in the order of their numbers, usually the training set's; unset: the values of this set.
        num_threads: number of shards whose `.json` members are read at a time.

    Raises:
        ValueError: if `field` has none of these forms, or `classes` contains a name twice.
        ShardError: if a sample lacks the field, or its value cannot name a class or is not in `classes`.
    """
    require_label_field("field", field)
    values, codes = _cls_values(shards) if field == "cls" else _json_values(shards, field, num_threads)
    # Classes are named by text, so that "1" and 1 could not be told apart.
    is_mixed = [value.type_name != values[0].type_name for value in values]
    if any(is_mixed):
        value, address = _first_invalid(shards, values, codes, is_mixed)
        problem, remedy = f"{field} is {value}, but other samples have {values[0]}", "use a single type of value"
        raise ShardError(problem, **address, remedy=remedy)
    names = tuple(value.text for value in sorted(values)) if classes is None else tuple(classes)
    if len(set(names)) < len(names):
        raise ValueError(f"classes must name each class once, got {names}")
    numbers = {name: number for number, name in enumerate(names)}
    is_unlisted = [value.text not in numbers for value in values]
    if any(is_unlisted):
        value, address = _first_invalid(shards, values, codes, is_unlisted)
        more = f" and {len(names) - _MAX_LISTED_CLASSES} more" if len(names) > _MAX_LISTED_CLASSES else ""
        listed = f"{', '.join(names[:_MAX_LISTED_CLASSES])}{more}"
        remedy = "remove the sample or name other classes"
        raise ShardError(f"{field} is {value}, which is not one of the classes {listed}", **address, remedy=remedy)
    number = np.array([numbers[value.text] for value in values], np.int64)
    is_numbered = np.array_equal(number, np.arange(len(number)))
    return Labels(field=field, number=codes if is_numbered else number[codes], classes=names)


def require_same_class_names(train: ShardSet, val: ShardSet) -> None:
    """Check that the class numbers of two sets mean the same classes, as far as their folders name them.

    `iwm shards pack` writes the names of the classes, in the order of their numbers, to `classes.json` in the folder of
    the shards. Folders without this file are not compared, nor are numbers that only one of the files names.

    Raises:
        ShardError: naming the first number that has two names.
    """
    folders = dict.fromkeys(os.path.dirname(path) for shards in (train, val) for path in shards.paths)
    first: list[tuple[str, str]] = []
    for path in (os.path.join(folder, "classes.json") for folder in folders):
        names = _read_class_names(path)
        for number, (name, (first_name, first_path)) in enumerate(zip(names, first, strict=False)):
            if name != first_name:
                problem = f"class {number} is {first_name!r} in {first_path}, but {name!r} in {path}"
                together = "pack both sets together with `iwm shards pack IMAGES FOLDER val_share=0.1`"
                again = f"pack the images of {os.path.dirname(path) or '.'} again with classes={first_path}"
                raise ShardError(problem, remedy=f"{together}, or {again}")
        first += [(name, path) for name in names[len(first) :]]


def _read_class_names(path: str) -> list[str]:
    """Return the names in a `classes.json`, none if there is no such file or it has another form."""
    try:
        with ShardFile(path) as file:
            names = json.loads(file.read_at(0, file.size_bytes))
    except FileNotFoundError:
        return []
    # A store may refuse access to a missing object.
    except (PermissionError, ValueError) as error:
        log.warning("the class names in %s are not compared: %s", path, error)
        return []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        log.warning("the class names in %s are not compared: it is not a JSON list of names", path)
        return []
    return names


def _first_invalid(
    shards: ShardSet, values: list[_Value], codes: Int64[np.ndarray, "samples"], is_invalid: list[bool]
) -> tuple[_Value, dict[str, str]]:
    """Return the value of the first sample with an invalid one, with the sample's shard and key."""
    sample = int(np.flatnonzero(np.array(is_invalid)[codes])[0])
    return values[int(codes[sample])], shards.shard_and_key(sample)


def _cls_values(shards: ShardSet) -> tuple[list[_Value], Int64[np.ndarray, "samples"]]:
    """Return the distinct `.cls` labels, and for each sample the index of its label among them."""
    shards.require_labels("an evaluation on cls")
    values = np.unique(np.concatenate([np.unique(shard.label) for shard in shards.shards]))
    # Numbers that already are 0 .. K - 1 stay in the index, whose memory processes share.
    is_numbered = int(values[-1]) == len(values) - 1
    codes = shards.all_labels if is_numbered else np.searchsorted(values, shards.all_labels)
    return [_Value("integer", value) for value in values.tolist()], codes


def _json_values(shards: ShardSet, field: str, num_threads: int) -> tuple[list[_Value], Int64[np.ndarray, "samples"]]:
    """Return the distinct values of a `.json` field, and for each sample the index of its value among them."""
    with ThreadPoolExecutor(num_threads, thread_name_prefix="labels") as pool:
        results = list(pool.map(_shard_values, shards.shards, repeat(field)))
    indices: dict[_Value, int] = {}
    all_codes = []
    # The shards number their values independently.
    for values, codes in results:
        renumbered = [indices.setdefault(value, len(indices)) for value in values]
        all_codes.append(np.array(renumbered, np.int64)[codes])
    return list(indices), np.concatenate(all_codes)


def _shard_values(shard: Shard, field: str) -> tuple[list[_Value], Int64[np.ndarray, "samples"]]:
    missing = np.flatnonzero(shard.json_offset == 0)
    if len(missing):
        extent = f"{len(missing)} of {len(shard.keys)} samples of this shard lack it"
        problem = f"has no .json member ({extent}), but {field} is needed"
        remedy = "add the member to each sample"
        raise ShardError(problem, shard=shard.path, key=shard.keys[int(missing[0])], remedy=remedy)
    indices: dict[_Value, int] = {}
    with ShardFile(shard.path) as file:
        require_unchanged(shard, file)
        members = zip(shard.keys, _json_members(shard, file), strict=True)
        codes = [
            indices.setdefault(_parse_value(shard.path, key, content, field), len(indices)) for key, content in members
        ]
    return list(indices), np.array(codes, np.int64)


def _json_members(shard: Shard, file: ShardFile) -> Iterator[bytes]:
    """Yield all `.json` members; neighbouring ones are read in one request, together with the bytes between them."""
    begins, ends = shard.json_offset.tolist(), (shard.json_offset + shard.json_size).tolist()
    gap, first = REMOTE_STEP if "://" in shard.path else _LOCAL_GAP, 0
    for last, end in enumerate(ends):
        is_last = last + 1 == len(ends)
        # Extend the current request, which begins with the member `first`, while the next member is close.
        if not is_last and begins[last + 1] - end <= gap and ends[last + 1] - begins[first] <= _MAX_READ:
            continue
        content = file.read_at(begins[first], end - begins[first])
        for begin, stop in zip(begins[first : last + 1], ends[first : last + 1], strict=True):
            yield content[begin - begins[first] : stop - begins[first]]
        first = last + 1


def _parse_value(path: str, key: str, content: bytes, field: str) -> _Value:
    """Return the value of a field in a `.json` member; `path` and `key` are only for the error."""
    try:
        value: Any = json.loads(content)
    # Deeply nested brackets exceed the parser's recursion limit.
    except (ValueError, RecursionError) as error:
        remedy = "write the member again"
        raise ShardError(f"its .json does not parse: {error}", shard=path, key=key, remedy=remedy) from error
    for name in field.split(".")[1:]:
        if not isinstance(value, dict) or name not in value:
            existing = ", ".join(sorted(value)) if isinstance(value, dict) else f"{type(value).__name__}, no fields"
            problem = f"its .json has no field {field[len('json.') :]!r}"
            remedy = f"add it, or name one of the existing fields: {existing or 'none'}"
            raise ShardError(problem, shard=path, key=key, remedy=remedy)
        value = value[name]
    # type() and not isinstance(), because bool is a subclass of int.
    if type(value) not in _TYPE_NAMES:
        remedy = "a class is a string, an integer, true or false; map other values to classes first"
        raise ShardError(f"{field} is {json.dumps(value)[:80]}", shard=path, key=key, remedy=remedy)
    return _Value(_TYPE_NAMES[type(value)], value)
