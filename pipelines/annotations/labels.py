"""Labels of samples as class numbers: the `.cls` member, or any field of the `.json` member.

Loaders know nothing of them. A task reads its labels once and looks them up by a batch's sample numbers, so that
several tasks on several fields share one stream of batches.
"""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from iwm_fast.pipelines.config import check, check_label_field
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard import Shard, require_unchanged
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.storage.tar_reader import REMOTE_STEP, ShardFile

# about what a disk or a network folder delivers in the time of one more request; a remote store's is REMOTE_STEP
_LOCAL_GAP = 128 * 1024
# each thread holds this much
_LARGEST_READ = 8 * 1024 * 1024
_MOST_SHOWN = 20
_KINDS = {str: "string", int: "integer", bool: "boolean"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Labels:
    """One field of every sample of a set."""

    field: str
    """What they were read from: "cls" or "json.NAME"."""
    number: Int64[np.ndarray, "samples"]
    """Class number of each sample of the set, 0 .. K - 1."""
    classes: tuple[str, ...]
    """Name of each class: what stands in the shards, as text."""

    @property
    def counts(self) -> Int64[np.ndarray, "K"]:
        """Samples of each class, 0 where only other sets have some."""
        return np.bincount(self.number, minlength=len(self.classes)).astype(np.int64)

    def of(self, sample: Int64[Tensor, "B"]) -> Int64[Tensor, "B"]:
        """Return the class numbers of a batch, given its sample numbers."""
        return torch.from_numpy(self.number[sample.numpy()])


class _Value(NamedTuple):
    kind: str
    """Compared before the value, because True == 1."""
    value: str | int

    @property
    def text(self) -> str:
        return self.value if isinstance(self.value, str) else json.dumps(self.value)

    def __str__(self) -> str:
        return f"{self.kind} {json.dumps(self.value, ensure_ascii=False)}"


def read_labels(shards: ShardSet, field: str, *, classes: Sequence[str] | None = None, num_threads: int = 8) -> Labels:
    """Read one field of every sample; its distinct values are numbered in sorted order.

    Integers sort as numbers, so what is 0 .. K - 1 already stays as it is.

    Args:
        shards: the samples.
        field: "cls", or "json.NAME" for a field of the `.json` members, "json.NAME.NAME" for one inside another.
        classes: names in the order of their numbers, usually the training set's; unset: the values found here.
        num_threads: shards whose `.json` members are read at once.

    Raises:
        ValueError: if `field` is neither.
        ShardError: if a sample lacks the field, holds something that names no class, or a value not in `classes`.
    """
    check_label_field("field", field)
    values, code = _class_values(shards) if field == "cls" else _json_values(shards, field, num_threads)
    mixed = [value.kind != values[0].kind for value in values]
    if any(mixed):
        value, where = _first(shards, values, code, mixed)
        what, remedy = f"{field} is {value}, where others have {values[0]}", "write one kind of value throughout"
        raise ShardError(what, **where, remedy=remedy)
    names = tuple(value.text for value in sorted(values)) if classes is None else tuple(classes)
    check(len(set(names)) == len(names), "classes", names, "name each class once")
    numbers = {name: number for number, name in enumerate(names)}
    unseen = [value.text not in numbers for value in values]
    if any(unseen):
        value, where = _first(shards, values, code, unseen)
        more = f" and {len(names) - _MOST_SHOWN} more" if len(names) > _MOST_SHOWN else ""
        remedy = f"known are {', '.join(names[:_MOST_SHOWN])}{more}: leave the sample out or give other classes"
        raise ShardError(f"{field} is {value}, no class that is known", **where, remedy=remedy)
    number = np.array([numbers[value.text] for value in values], np.int64)[code]
    return Labels(field=field, number=number, classes=names)


def _first(
    shards: ShardSet, values: list[_Value], code: Int64[np.ndarray, "samples"], is_wrong: list[bool]
) -> tuple[_Value, dict[str, str]]:
    """Return the first wrong value with shard and key of its sample."""
    sample = int(np.flatnonzero(np.array(is_wrong)[code])[0])
    return values[int(code[sample])], shards.where(sample)


def _class_values(shards: ShardSet) -> tuple[list[_Value], Int64[np.ndarray, "samples"]]:
    shards.require_labels("a task on cls")
    found, code = np.unique(shards.labels(np.arange(shards.num_samples)), return_inverse=True)
    return [_Value("integer", value) for value in found.tolist()], code


def _json_values(shards: ShardSet, field: str, num_threads: int) -> tuple[list[_Value], Int64[np.ndarray, "samples"]]:
    """Return the distinct values of a field, and for each sample which of them it has."""
    with ThreadPoolExecutor(num_threads, thread_name_prefix="labels") as pool:
        found = list(pool.map(_shard_values, shards.shards, repeat(field)))
    numbers: dict[_Value, int] = {}
    codes = []
    for values, code in found:
        renumbered = [numbers.setdefault(value, len(numbers)) for value in values]
        codes.append(np.array(renumbered, np.int64)[code])
    return list(numbers), np.concatenate(codes)


def _shard_values(shard: Shard, field: str) -> tuple[list[_Value], Int64[np.ndarray, "samples"]]:
    missing = np.flatnonzero(shard.json_offset == 0)
    if len(missing):
        what = f"has no .json, like {len(missing)} of {len(shard.keys)} samples of this shard, and {field} is needed"
        remedy = "add the member to each sample"
        raise ShardError(what, shard=shard.path, key=shard.keys[int(missing[0])], remedy=remedy)
    numbers: dict[_Value, int] = {}
    with ShardFile(shard.path) as file:
        require_unchanged(shard, file)
        contents = zip(shard.keys, _json_members(shard, file), strict=True)
        code = [numbers.setdefault(_value(shard.path, *pair, field), len(numbers)) for pair in contents]
    return list(numbers), np.array(code, np.int64)


def _json_members(shard: Shard, file: ShardFile) -> Iterator[bytes]:
    """Yield every `.json` member; what lies near to each other is read at once, with what is between."""
    begins, ends = shard.json_offset.tolist(), (shard.json_offset + shard.json_size).tolist()
    gap, first = REMOTE_STEP if "://" in shard.path else _LOCAL_GAP, 0
    for last, end in enumerate(ends):
        is_last = last + 1 == len(ends)
        if not is_last and begins[last + 1] - end <= gap and ends[last + 1] - begins[first] <= _LARGEST_READ:
            continue
        content = file.read_at(begins[first], end - begins[first])
        for begin, stop in zip(begins[first : last + 1], ends[first : last + 1], strict=True):
            yield content[begin - begins[first] : stop - begins[first]]
        first = last + 1


def _value(path: str, key: str, content: bytes, field: str) -> _Value:
    try:
        value: Any = json.loads(content)
    except (ValueError, RecursionError) as error:
        remedy = "write the member again"
        raise ShardError(f"its .json does not parse: {error}", shard=path, key=key, remedy=remedy) from error
    for name in field.split(".")[1:]:
        if not isinstance(value, dict) or name not in value:
            there = ", ".join(sorted(value)) if isinstance(value, dict) else f"{type(value).__name__}, no fields"
            what = f"its .json has no {field[len('json.') :]!r}"
            raise ShardError(what, shard=path, key=key, remedy=f"add it, or name what is there: {there or 'nothing'}")
        value = value[name]
    if type(value) not in _KINDS:
        remedy = "a class is a string, an integer, true or false; other values must be sorted into classes first"
        raise ShardError(f"{field} is {json.dumps(value)[:80]}", shard=path, key=key, remedy=remedy)
    return _Value(_KINDS[type(value)], value)
