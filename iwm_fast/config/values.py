"""Converts values of settings to the types of their fields, from YAML, the command line, JSON and Python alike."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from iwm_fast.config.strict_yaml import Scalar, parse_float, parse_int, resolve
from iwm_fast.pipelines.config import require

# Settings end up in arithmetic in float32 and int64.
_MAX_FLOAT, _MAX_INT = 3.4e38, 2**63 - 1
_BOOLEANS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_NOUNS = {
    bool: ("true or false", "truth values"),
    int: ("a whole number", "whole numbers"),
    float: ("a finite number", "finite numbers"),
    str: ("text in UTF-8 without NUL characters", "texts"),
}


def convert(name: str, kind: Any, value: Any) -> Any:
    """Return a value as the type of its setting.

    Args:
        name: dotted name of the setting, for messages.
        kind: type of the setting: str, bool, int, float, Literal, a tuple of these, one of them or None, or a dict.
        value: the given value; numbers and truth values may be given as text.

    Raises:
        ValueError: if the value has another type, is not finite, or is too large for any setting. A note names the
            line of the file in which the setting is.
    """
    try:
        return _convert(kind, value)
    except ValueError:
        with named_place(value):
            require(False, name, resolve(value), f"be {_describe(kind)}")


@contextmanager
def named_place(text: Any) -> Iterator[None]:
    """Add a note to an error that names file and line of a key or value, if it was read from a file."""
    try:
        yield
    except ValueError as error:
        text = text[0] if isinstance(text, list) and text else text
        if isinstance(text, Scalar) and text.where:
            error.add_note(f"it is set in {text.where}")
        raise error from None


def _convert(kind: Any, value: Any) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if value is None else _convert(_without_none(parts), value)
    if origin is Literal:
        # Compared as text, because in Python 1 equals True. YAML's null has become None.
        text = "null" if value is None else str(value)
        choices = [choice for choice in parts if str(choice) == text]
        _accept(len(choices) == 1)
        return choices[0]
    if origin is tuple:
        _accept(isinstance(value, list | tuple))
        kinds = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        _accept(len(value) == len(kinds))
        return tuple(map(_convert, kinds, value))
    if origin is dict:
        _accept(isinstance(value, dict))
        return resolve(value)
    return {bool: _to_bool, int: _to_int, float: _to_float, str: _to_text}[kind](value)


def _accept(condition: bool) -> None:
    if not condition:
        raise ValueError("the value has another type")


def _to_bool(value: Any) -> bool:
    boolean: Any = _BOOLEANS.get(value.lower()) if isinstance(value, str) else value
    _accept(isinstance(boolean, bool))
    return boolean


def _to_int(value: Any) -> int:
    number: Any = parse_int(value) if isinstance(value, str) else value
    _accept(isinstance(number, int) and not isinstance(number, bool) and abs(number) <= _MAX_INT)
    return number


def _to_float(value: Any) -> float:
    number: Any = parse_float(value) if isinstance(value, str) else value
    # Written so that NaN is refused, too.
    _accept(isinstance(number, int | float) and not isinstance(number, bool) and abs(number) <= _MAX_FLOAT)
    return float(number)


def _to_text(value: Any) -> str:
    _accept(isinstance(value, str) and "\0" not in value)
    # Raises ValueError for bytes of the command line that are not UTF-8, which config.yaml could not contain.
    value.encode("utf-8")
    return str(value)


def _without_none(parts: tuple[Any, ...]) -> Any:
    return next(part for part in parts if part is not NoneType)


def _describe(kind: Any) -> str:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return f"{_describe(_without_none(parts))}, or null"
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is tuple:
        item = parts[0]
        nouns = _NOUNS[item][1] if item in _NOUNS else f"some of {', '.join(get_args(item))}"
        return f"a list of {nouns}" if parts[-1] is Ellipsis else f"a list of {len(parts)} {nouns}, as in [A, B]"
    return _NOUNS[kind][0] if kind in _NOUNS else "a mapping, as in {key: value}"
