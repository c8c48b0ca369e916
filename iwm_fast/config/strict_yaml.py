"""Reads YAML strictly: what is ambiguous, or is meant for programs rather than people, is refused with its line.

There is one document in UTF-8, with text, numbers, lists and mappings. A key occurs once in a mapping. There are no
tags, and limits on size and depth, because aliases let a short file stand for one that fills the memory.
"""

import copy
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import yaml
from yaml import events

MAX_BYTES = 2**20
MAX_DEPTH = 20
# Counted after aliases are expanded. The longest packaged file has about 500.
MAX_NODES = 20_000

# YAML 1.1 reads 010 as 8 and 1:30 as 90, unlike most people. No number of anything has more digits.
_INT = re.compile(r"[-+]?(0|[1-9](_?[0-9]){0,39})")
_FLOAT = re.compile(r"[-+]?([0-9](_?[0-9])*\.?|[0-9](_?[0-9])*\.[0-9]+|\.[0-9]+)(e[-+]?[0-9]{1,9})?", re.IGNORECASE)
_NULLS = ("", "~", "null", "Null", "NULL")


class Scalar(str):
    """Text of a key or value, whose meaning depends on the type of the setting: `1e-3`, `no` and `007` may be names."""

    where: str
    """File and line, such as "run.yaml, line 3"; empty for a value of the command line."""
    is_quoted: bool

    def __new__(cls, text: str, where: str, is_quoted: bool) -> "Scalar":
        scalar = super().__new__(cls, text)
        scalar.where, scalar.is_quoted = where, is_quoted
        return scalar

    def __deepcopy__(self, _: dict[int, Any]) -> "Scalar":
        return self


def read_yaml(path: Path) -> Any:
    """Return the value of a YAML file, None if it is empty. Scalars are `Scalar`, except for null, which is None.

    Raises:
        ValueError: if the file cannot be read, or is not strict YAML; the message names file and line.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} must have at most {MAX_BYTES:,} bytes, as a file of settings; name a YAML file")
    return _Reader(_decode(data, path), str(path), names_lines=True).read()


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a short YAML text, such as a value of the command line; `source` names it in messages.

    Raises:
        ValueError: if it is not strict YAML.
    """
    return _Reader(text, source, names_lines=False).read()


def resolve(node: Any) -> Any:
    """Return a tree in which unquoted scalars that look like numbers or truth values have become these."""
    if isinstance(node, dict):
        return {str(name): resolve(child) for name, child in node.items()}
    if isinstance(node, list):
        return [resolve(child) for child in node]
    if not isinstance(node, Scalar):
        return node
    if node.is_quoted:
        return str(node)
    if node.lower() in ("true", "false"):
        return node.lower() == "true"
    return next((value for value in (parse_int(node), parse_float(node)) if value is not None), str(node))


def parse_int(text: str) -> int | None:
    """Return the integer that a text is in decimal notation, None for any other text."""
    return int(text) if _INT.fullmatch(text) else None


def parse_float(text: str) -> float | None:
    """Return the finite number that a text denotes in decimal or scientific notation, None for any other text."""
    number = float(text) if _FLOAT.fullmatch(text) else math.inf
    return number if math.isfinite(number) else None


def _decode(data: bytes, path: Path) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} must be text in UTF-8, got UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line, byte = data.count(b"\n", 0, error.start) + 1, data[error.start]
        raise ValueError(
            f"{path} must be text in UTF-8, got byte 0x{byte:02x} in line {line}; save it as UTF-8"
        ) from error


class _Reader:
    """Builds the value of a text from its events, and stops at the first one that is not accepted."""

    def __init__(self, text: str, source: str, *, names_lines: bool) -> None:
        self._source: str = source
        self._names_lines: bool = names_lines
        self._events = self._parse(text)
        self._num_nodes: int = 0
        # Value and number of nodes by name of the anchor.
        self._anchors: dict[str, tuple[Any, int]] = {}

    def read(self) -> Any:
        next(self._events)
        if isinstance(next(self._events), events.StreamEndEvent):
            return None
        value = self._read_node(next(self._events), "", 0)
        next(self._events)
        after = next(self._events)
        if not isinstance(after, events.StreamEndEvent):
            self._refuse(after, "a second document begins here; use one file per document")
        return value

    def _parse(self, text: str) -> Iterator[Any]:
        """Yield the events of PyYAML's parser, which reads lazily and without recursion."""
        try:
            yield from yaml.parse(text, Loader=yaml.SafeLoader)
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            self._refuse(line, f"unexpected {text[error.position]!r}", "is not valid YAML")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            remedy = "; indent with spaces" if "'\\t'" in str(error.problem) else ""
            problem = f"{error.problem or error.context}{remedy}"
            self._refuse(mark.line + 1 if mark else 1, problem, "is not valid YAML")
        # PyYAML does not check the code of an escape sequence such as "\UFFFFFFFF".
        except (OverflowError, ValueError):
            self._refuse(1, "an escape sequence names no character", "is not valid YAML")

    def _read_node(self, event: Any, name: str, depth: int) -> Any:
        """Return the value that begins with an event; `name` is the dotted name of its key."""
        first = self._num_nodes
        self._count(event, 1)
        if depth > MAX_DEPTH:
            self._refuse(event, f"values must be nested at most {MAX_DEPTH} deep")
        if isinstance(event, events.AliasEvent):
            if event.anchor not in self._anchors:
                self._refuse(event, f"no value before this one has the anchor &{event.anchor}")
            value, size = self._anchors[event.anchor]
            self._count(event, size)
            # A copy, because settings of the command line are written into one of the places.
            return copy.deepcopy(value)
        self._refuse_tag(event)
        if isinstance(event, events.ScalarEvent):
            is_plain = event.style is None
            value = None if is_plain and event.value in _NULLS else self._scalar(event)
        elif isinstance(event, events.SequenceStartEvent):
            value = []
            while not isinstance(item := next(self._events), events.SequenceEndEvent):
                value.append(self._read_node(item, name, depth + 1))
        else:
            value = self._read_mapping(name, depth)
        if event.anchor:
            self._anchors[event.anchor] = value, self._num_nodes - first
        return value

    def _read_mapping(self, name: str, depth: int) -> dict[str, Any]:
        mapping: dict[str, Any] = {}
        lines: dict[str, int] = {}
        merged: dict[str, Any] = {}
        while not isinstance(event := next(self._events), events.MappingEndEvent):
            if not isinstance(event, events.ScalarEvent):
                self._refuse(event, "a key must be text")
            self._refuse_tag(event)
            key = self._scalar(event)
            full_name = f"{name}.{key}" if name else str(key)
            if key in lines:
                self._refuse(event, f"{full_name!r} occurs twice, first in line {lines[key]}; remove or merge one")
            lines[key] = event.start_mark.line + 1
            value = self._read_node(next(self._events), full_name, depth + 1)
            if key == "<<" and not key.is_quoted:
                merged = self._merge(event, value)
            else:
                mapping[key] = value
        return merged | mapping

    def _merge(self, event: Any, value: Any) -> dict[str, Any]:
        """Return the settings that a merge key `<<` adds; those of earlier mappings take precedence."""
        mappings = value if isinstance(value, list) else [value]
        merged: dict[str, Any] = {}
        for mapping in reversed(mappings):
            if not isinstance(mapping, dict):
                self._refuse(event, "the merge key << must be followed by the alias of a mapping, or a list of them")
            merged |= mapping
        return merged

    def _refuse_tag(self, event: Any) -> None:
        if event.tag is not None:
            tag = event.tag.replace("tag:yaml.org,2002:", "!!")
            self._refuse(event, f"tags such as {tag} are not accepted; write the value without it")

    def _scalar(self, event: Any) -> Scalar:
        where = f"{self._source}, line {event.start_mark.line + 1}" if self._names_lines else ""
        return Scalar(event.value, where, event.style is not None)

    def _count(self, event: Any, size: int) -> None:
        self._num_nodes += size
        if self._num_nodes > MAX_NODES:
            self._refuse(event, f"aliases must stand for at most {MAX_NODES:,} values in all")

    def _refuse(self, place: Any, problem: str, verdict: str = "is not accepted") -> NoReturn:
        """Raise the error for an event, or for the line with a number that is counted from 1."""
        line = place if isinstance(place, int) else place.start_mark.line + 1
        in_line = f" in line {line}" if self._names_lines else ""
        raise ValueError(f"{self._source} {verdict}{in_line}: {problem}") from None
