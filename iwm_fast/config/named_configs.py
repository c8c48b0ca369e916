"""Finds the YAML file of a run by path or by name, and reads it together with the files that it is based on."""

import difflib
from pathlib import Path
from typing import Any

from iwm_fast.config.strict_yaml import read_yaml, resolve
from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.transforms.composition import upgraded_views

CONFIGS = Path(__file__).parents[1] / "configs"


def named_configs() -> dict[str, Path]:
    """Return the files of the packaged runs by name. Labs, which are not runs, are left out."""
    return {path.stem: path for path in sorted(CONFIGS.glob("*.yaml")) if not path.stem.startswith("lab_")}


def find_config(name: str | Path, folder: Path = Path()) -> Path:
    """Return the YAML file at a path, or else the packaged one with this name, such as `vit_s16`.

    Args:
        name: a path, or a name with or without .yaml.
        folder: folder that a relative path starts from.

    Raises:
        FileNotFoundError: if there is neither; the message lists the packaged names.
        ValueError: if it is an option or a setting.
    """
    path, configs, text = folder / name, named_configs(), str(name)
    require("\0" not in text, "the configuration file", text, "be a path")
    if path.is_file():
        return path
    is_path = not text.startswith("-") and "=" not in text
    require(is_path, "the first argument", text, "be a YAML file or the name of a configuration; settings follow it")
    if text.removesuffix(".yaml") in configs:
        return configs[text.removesuffix(".yaml")]
    # The user may have meant a file without naming it completely, or the folder of a run.
    nearby = [other for other in (f"{text}.yaml", f"{text}/config.yaml") if (folder / other).is_file()]
    matches = nearby or difflib.get_close_matches(Path(text).stem, configs, n=1)
    hint = f"; did you mean {matches[0]!r}?" if matches else ""
    raise FileNotFoundError(
        f"no configuration file {text!r}; give the path of a YAML file or one of the names {', '.join(configs)}{hint}"
    )


def read_settings(path: Path, dependents: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the settings of a YAML file, merged over those of the file that it names as its `base`.

    Args:
        path: the file.
        dependents: files that are based on it, the first one first; they must not occur again.

    Raises:
        FileNotFoundError: if the base does not exist.
        ValueError: if a file is not valid YAML, or is based on itself.
    """
    files = (*dependents, path.resolve())
    if path.resolve() in dependents:
        raise ValueError(f"base must not lead back to the same file, got {' -> '.join(map(str, files))}; remove one")
    tree = read_yaml(path) or {}
    require(isinstance(tree, dict), str(path), resolve(tree), "hold `group:` and `key: value` lines")
    if "views" in tree:
        tree["views"] = upgraded_views(tree["views"])
    if "base" not in tree:
        return tree
    base = tree.pop("base")
    require(
        isinstance(base, str) and bool(base), f"base of {path}", resolve(base), "be the name or path of a configuration"
    )
    try:
        base_path = find_config(base, path.parent)
    except FileNotFoundError as error:
        error.add_note(f"{path} names it as its base; a relative path starts from the folder of that file")
        raise
    return merge_settings(read_settings(base_path, files), tree)


def merge_settings(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested settings in which those of `changes` replace those of `base`."""
    merged = dict(base)
    for name, value in changes.items():
        if isinstance(base.get(name), dict) and isinstance(value, dict):
            merged[name] = merge_settings(base[name], value)
        # A group whose settings are all commented out is None in YAML, and changes nothing.
        elif not (isinstance(base.get(name), dict) and value is None):
            merged[name] = value
    return merged
