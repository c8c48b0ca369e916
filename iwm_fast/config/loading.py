"""Settings in and out: YAML plus `key=value`, and what each setting means.

Importing this file must stay cheap (no torch): `--help` reads it.
"""

import ast
import dataclasses
import difflib
import functools
import inspect
import json
import textwrap
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from iwm_fast.config.run import RunConfig
from iwm_fast.pipelines.config import check

Config = TypeVar("Config")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML and apply dotted `key=value` overrides; what is not named keeps its default.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown key (with the nearest known one), a value of the wrong kind or out of range.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no configuration file {str(path)!r}; give the path of a YAML file")
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    check(isinstance(tree, dict), str(path), type(tree).__name__, "hold `group:` and `key: value` lines")
    return build(RunConfig, tree, overrides)


def load_run_config(run: Path) -> RunConfig:
    """Read the settings of a run from its folder.

    Raises:
        FileNotFoundError: if the folder holds no run.
        ValueError: if a setting is unknown or out of range here.
    """
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{str(run)!r} is no run folder: it has no config.yaml; give run=DIR of a training run, or an export"
        )
    return load_config(run / "config.yaml")


def build(kind: type[Config], tree: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Build a checked configuration from nested dicts that hold differences from the defaults, then overrides.

    Raises:
        ValueError: for an unknown key or an unfit value.
    """
    for override in overrides:
        _apply_override(kind, tree, override)
    _check_groups(kind, tree)
    data = tree.get("data")
    for name in ("train", "val"):
        if isinstance(data, dict) and isinstance(data.get(name), list):
            data[name] = "::".join(data[name])
    try:
        # paths may hold "${", which OmegaConf would take for an interpolation
        merged = OmegaConf.merge(OmegaConf.structured(kind), OmegaConf.create(_escape(tree)))
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise ValueError(_unknown_key(kind, str(error.full_key))) from error
    except OmegaConfBaseException as error:
        place = f"{error.full_key}: " if getattr(error, "full_key", None) else ""
        raise ValueError(place + str(error).splitlines()[0]) from error
    assert isinstance(config, kind)
    return config


def _check_groups(kind: Any, tree: dict[str, Any], prefix: str = "") -> None:
    for group in dataclasses.fields(kind):
        if dataclasses.is_dataclass(group.type) and group.name in tree:
            name, value = f"{prefix}{group.name}", tree[group.name]
            check(isinstance(value, dict), name, value, "hold settings as `key: value`")
            _check_groups(group.type, value, f"{name}.")


def _escape(node: Any) -> Any:
    if isinstance(node, dict):
        return {name: _escape(child) for name, child in node.items()}
    if isinstance(node, list):
        return [_escape(child) for child in node]
    return node.replace("${", "\\${") if isinstance(node, str) else node


def _apply_override(kind: type, tree: dict[str, Any], override: str) -> None:
    name, equals, text = override.partition("=")
    check(bool(equals) and bool(name), "override", override, "have the form group.key=value")
    kinds = {known: _type_name(field) for known, field, _ in _leaf_fields(kind)}
    if name not in kinds and not name.startswith("runtime.deepspeed."):
        raise ValueError(_unknown_key(kind, name))
    # text settings are taken as they stand: a path may look like YAML
    value = text if kinds.get(name) == "str" else yaml.safe_load(text)
    *groups, leaf = name.split(".")
    for group in groups:
        tree = tree.setdefault(group, {})
        check(isinstance(tree, dict), group, tree, "be a group of settings")
    tree[leaf] = value


def _unknown_key(kind: type, name: str) -> str:
    known = [leaf for leaf, _, _ in _leaf_fields(kind)]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = (
        f"did you mean {near[0]!r}?" if near else f"known are {', '.join(row.name for row in dataclasses.fields(kind))}"
    )
    return f"unknown setting {name!r}; {hint}"


def iter_settings(kind: Any) -> Iterator[tuple[str, str, Any, str]]:
    """Yield (dotted name, type, default, explanation) of every setting, in order."""
    for name, item, owner in _leaf_fields(kind):
        has_default = item.default is not dataclasses.MISSING
        default = item.default if has_default else item.default_factory()  # type: ignore[misc]
        yield name, _type_name(item), default, _field_texts(owner)[item.name]


def _leaf_fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]", Any]]:
    """Yield (dotted name, field, its dataclass) of every setting, in order."""
    for item in dataclasses.fields(kind):
        if dataclasses.is_dataclass(item.type):
            yield from _leaf_fields(item.type, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item, kind


def _type_name(item: "dataclasses.Field[Any]") -> str:
    return item.type.__name__ if isinstance(item.type, type) else str(item.type).replace("typing.", "")


def settings_text(kind: Any) -> str:
    """Return every setting of a dataclass with its type, default and explanation, as `--help` prints them."""
    rows = [
        f"  {name} ({type_name}, {default!r})\n      {text}" for name, type_name, default, text in iter_settings(kind)
    ]
    return "\n".join(["settings (type, default):", *rows])


@functools.cache
def _field_texts(kind: type) -> dict[str, str]:
    """Return the string under each field, inherited ones included."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            texts |= _own_field_texts(base)
    return texts


def _own_field_texts(kind: Any) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0].body  # type: ignore[attr-defined]
    texts = {}
    for statement, after in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            texts[statement.target.id] = str(after.value.value) if is_text else ""  # type: ignore[union-attr]
    return texts


def to_tree(config: Any) -> dict[str, Any]:
    """Return nested plain dicts and lists, fit for YAML and JSON."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def save_config(config: RunConfig, path: Path) -> None:
    """Write every setting, defaults included, as YAML that `load_config` reads back."""
    path.write_text(yaml.safe_dump(to_tree(config), sort_keys=False), encoding="utf-8")
