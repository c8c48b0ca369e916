"""Reads settings from YAML and `key=value` overrides, writes them, and explains them for `--help`.

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

from iwm_fast.config.named_configs import find_config, read_settings
from iwm_fast.config.run import RunConfig
from iwm_fast.config.shard_paths import absolute_shards
from iwm_fast.config.strict_yaml import parse_yaml, resolve
from iwm_fast.config.values import convert, named_place
from iwm_fast.pipelines.config import INTERNAL, SourceConfig, require
from iwm_fast.pipelines.transforms.composition import RENAMED

Config = TypeVar("Config")


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's YAML file and apply dotted `key=value` overrides; all other settings keep their defaults.

    Args:
        path: path of the file, or name of a packaged one, such as `vit_s16`.
        overrides: texts of the form `group.key=value`.

    Raises:
        FileNotFoundError: if there is no such file, or its `base` does not exist.
        ValueError: for an unknown key (naming the closest valid one) or a value of the wrong type or out of range.
    """
    return build(RunConfig, read_settings(find_config(path)), overrides)


def load_run_config(run: Path) -> RunConfig:
    """Read the settings of a run from the config.yaml in its folder.

    Raises:
        FileNotFoundError: if the folder has no config.yaml.
        ValueError: if a setting is unknown or out of range in this version.
    """
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{str(run)!r} is not a run folder: it has no config.yaml; set run to the folder of a run or export"
        )
    try:
        return load_config(run / "config.yaml")
    except ValueError as error:
        error.add_note(f"these are the settings of the run in {str(run)!r}")
        raise


def build(config_class: type[Config], tree: dict[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Build a checked configuration.

    Args:
        config_class: dataclass to build.
        tree: nested dicts of settings that differ from the defaults; changed in place.
        overrides: texts of the form `group.key=value`, applied after the tree.

    Raises:
        ValueError: for an unknown key, or a value of the wrong type or out of range.
    """
    for override in overrides:
        _apply_override(config_class, tree, override)
    return _build_group(config_class, tree, "", config_class)


def _build_group(kind: Any, tree: Any, prefix: str, config_class: type) -> Any:
    """Build the dataclass of one group; `prefix` is its dotted name with a dot at the end, `config_class` the root."""
    require(isinstance(tree, dict), prefix.rstrip(".") or "the settings", tree, "hold settings as `key: value`")
    settings = {setting.name: setting for setting in dataclasses.fields(kind) if setting.metadata != INTERNAL}
    values: dict[str, Any] = {}
    for name, value in tree.items():
        with named_place(name):
            if name not in settings:
                raise ValueError(_unknown_key_message(config_class, f"{prefix}{name}"))
        group = settings[name].type
        if f"{prefix}{name}" == "data.train" and _is_mixture(value):
            values["mixture"] = tuple(_build_source(number, source) for number, source in enumerate(value))
        elif not dataclasses.is_dataclass(group):
            values[name] = convert(f"{prefix}{name}", group, _join_shards(f"{prefix}{name}", value))
        # In YAML, a group whose settings are all commented out is null.
        elif value is not None:
            values[name] = _build_group(group, value, f"{prefix}{name}.", config_class)
    return kind(**values)


def _join_shards(name: str, value: Any) -> Any:
    """Return a YAML list of shards as one string, because the setting has one type on the command line, too."""
    is_list = name in ("data.train", "data.val") and isinstance(value, list)
    return "::".join(convert(name, tuple[str, ...], value)) if is_list else value


def _is_mixture(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(source, dict) for source in value)


def _build_source(number: int, tree: Any) -> SourceConfig:
    """Build a source of the mixture in data.train."""
    kinds: dict[str, Any] = {setting.name: setting.type for setting in dataclasses.fields(SourceConfig)}
    place = f"data.train[{number}]"
    accepted = f"have the keys {', '.join(kinds)} and no others, like all sources of a mixture"
    require(isinstance(tree, dict) and tree.keys() == kinds.keys(), place, resolve(tree), accepted)
    tree = tree | {"shards": _join_shards("data.train", tree["shards"])}
    return SourceConfig(**{name: convert(f"{place}.{name}", kind, tree[name]) for name, kind in kinds.items()})


def _apply_override(config_class: type, tree: dict[str, Any], override: str) -> None:
    """Write the value of a `group.key=value` text into the tree, in place."""
    name, equals, text = override.partition("=")
    if override.startswith("-"):
        raise ValueError(f"unknown option {override!r}; settings are given as group.key=value, without dashes")
    if not equals and name.endswith((".yaml", ".yml")):
        raise ValueError(f"one YAML file can be given, got {name!r} as well; name it as the base of the first one")
    require(bool(equals) and bool(name), "override", override, "have the form group.key=value")
    kinds = {setting: field.type for setting, field, _ in _leaf_fields(config_class)}
    # runtime.deepspeed is a dict, whose keys RuntimeConfig checks.
    if name not in kinds and not name.startswith("runtime.deepspeed."):
        raise ValueError(_unknown_key_message(config_class, name))
    *groups, leaf = name.split(".")
    for number, group in enumerate(groups):
        tree[group] = {} if tree.get(group) is None else tree[group]
        tree = tree[group]
        require(isinstance(tree, dict), ".".join(groups[: number + 1]), tree, "hold settings as `key: value`")
    # The text of a string setting is used verbatim: a path such as {a,b}.tar is also valid YAML for something else.
    tree[leaf] = text if kinds.get(name) is str else _parse_override(name, text)


def _parse_override(name: str, text: str) -> Any:
    require(bool(text.strip()), name, text, "have a value after the equals sign; null means unset")
    return parse_yaml(text, f"the value of {name}")


def _unknown_key_message(config_class: type, name: str) -> str:
    if name in RENAMED and config_class is RunConfig:
        return f"{name!r} is now named {RENAMED[name]!r}"
    settings = [setting for setting, _, _ in _leaf_fields(config_class)]
    members = [setting for setting in settings if setting.startswith(f"{name}.")]
    if members:
        return f"{name!r} is a group of settings; set them one by one, such as {members[0]}=VALUE"
    if name in settings:
        return (
            f"{name!r} must be written as nested groups in YAML, {name.replace('.', ': {')}: ...{'}' * name.count('.')}"
        )
    # A setting without its group, or else a misspelling.
    matches = [setting for setting in settings if setting.endswith(f".{name}")]
    matches = matches or difflib.get_close_matches(name, settings, n=1, cutoff=0.5)
    names = ", ".join(item.name for item in dataclasses.fields(config_class))
    hint = f"did you mean {matches[0]!r}?" if matches else f"the top-level names are {names}"
    return f"unknown setting {name!r}; {hint}"


def iter_settings(config_class: Any) -> Iterator[tuple[str, str, Any, str]]:
    """Yield (dotted name, type, default, explanation) of every setting, in order of declaration."""
    for name, item, owner in _leaf_fields(config_class):
        has_default = item.default is not dataclasses.MISSING
        default = item.default if has_default else item.default_factory()  # type: ignore[misc]
        yield name, _type_name(item), default, _field_docs(owner)[item.name]


def _leaf_fields(config_class: Any, prefix: str = "") -> Iterator[tuple[str, "dataclasses.Field[Any]", Any]]:
    """Yield (dotted name, field, dataclass that has the field) of every setting, in order of declaration."""
    for item in dataclasses.fields(config_class):
        if item.metadata == INTERNAL:
            continue
        if dataclasses.is_dataclass(item.type):
            yield from _leaf_fields(item.type, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", item, config_class


def _type_name(item: "dataclasses.Field[Any]") -> str:
    return item.type.__name__ if isinstance(item.type, type) else str(item.type).replace("typing.", "")


def format_settings(config_class: Any) -> str:
    """Return the text of `--help`: every setting with its type, default and explanation."""
    entries = [
        f"  {name} ({type_name}, {default!r})\n      {text}"
        for name, type_name, default, text in iter_settings(config_class)
    ]
    return "\n".join(["settings (type, default):", *entries])


# Cached, because parsing the source for every field would make `--help` slow.
@functools.cache
def _field_docs(config_class: type) -> dict[str, str]:
    """Return the docstring under each field, including inherited fields."""
    docs: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        if dataclasses.is_dataclass(base):
            docs |= _declared_field_docs(base)
    return docs


def _declared_field_docs(config_class: Any) -> dict[str, str]:
    # Python discards the strings under fields, so they are read from the source.
    body = ast.parse(textwrap.dedent(inspect.getsource(config_class))).body[0].body  # type: ignore[attr-defined]
    docs = {}
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            is_doc = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
            docs[statement.target.id] = str(following.value.value) if is_doc else ""  # type: ignore[union-attr]
    return docs


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as nested dicts and lists that YAML and JSON can represent."""
    tree = json.loads(json.dumps(dataclasses.asdict(config)))
    mixture = tree.get("data", {}).pop("mixture", ())
    if mixture:
        # As it is written in YAML.
        tree["data"]["train"] = mixture
    return tree


def saved_tree(config: RunConfig) -> dict[str, Any]:
    """Return every setting as `save_config` writes it: shard paths are absolute, to hold from any working directory."""
    tree = config_to_dict(config)
    tree["data"]["val"] = absolute_shards(config.data.val)
    if not config.data.mixture:
        tree["data"]["train"] = absolute_shards(config.data.train)
    for source in tree["data"]["train"] if config.data.mixture else ():
        source["shards"] = absolute_shards(source["shards"])
    return tree


def save_config(config: RunConfig, path: Path) -> None:
    """Write every setting, including defaults, as a YAML file that `load_config` reads; shard paths become absolute."""
    path.write_text(yaml.safe_dump(saved_tree(config), sort_keys=False), encoding="utf-8")
