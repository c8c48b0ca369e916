"""`iwm configs` and `iwm init`: list the packaged configurations, and start a file of one's own from one of them."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import yaml

from iwm_fast.config.loading import config_to_dict, iter_settings, load_config
from iwm_fast.config.named_configs import find_config, named_configs
from iwm_fast.config.run import RunConfig
from iwm_fast.pipelines.config import require

# The settings that users change first, in the order of the file.
_SETTINGS = (
    "data.train", "data.val", "optim.global_batch_size", "optim.epochs", "optim.lr", "runtime.micro_batch_size",
    "runtime.loader_threads", "runtime.ops", "output.folder", "output.checkpoint_every", "output.evaluate_every",
)  # fmt: skip
_LINE_LENGTH = 100


def list_configs() -> str:
    """Return a table of the packaged configurations: name and first comment line."""
    configs = named_configs()
    width = max(map(len, configs))
    rows = [f"  {name:{width}}  {_first_comment(path)}" for name, path in configs.items()]
    usage = "A name can be used instead of RUN.yaml: `iwm train NAME`. `iwm init NAME my.yaml` starts a file from it."
    return "\n".join([*rows, "", usage])


def _first_comment(path: Path) -> str:
    return path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")


def write_starter(name: str, path: Path, overrides: Sequence[str] = ()) -> Path:
    """Write a YAML file based on a packaged configuration, with the settings that users change first as comments.

    Settings that `overrides` change, texts of the form `group.key=value`, are written without the comment sign.

    Raises:
        FileNotFoundError: if there is no such configuration, or no folder for the file.
        FileExistsError: if the file exists.
        ValueError: if the file does not end with .yaml, or an override names a setting that the file does not show.
    """
    require(path.suffix == ".yaml", "the file to write", str(path), "end with .yaml")
    # Raises with the list of names if there is no such configuration.
    find_config(name)
    require(name in named_configs(), "the base", name, "be a name that `iwm configs` lists; copy a file instead")
    changed = {override.partition("=")[0] for override in overrides}
    unknown = sorted(changed - set(_SETTINGS))
    require(not unknown, "settings of iwm init", unknown, f"be among {', '.join(_SETTINGS)}; add others to the file")
    text = _starter(name, path, overrides, changed)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise FileExistsError(f"{str(path)!r} exists already and is not overwritten; name another file") from None
    return path


def _starter(name: str, path: Path, overrides: Sequence[str], changed: set[str]) -> str:
    config = load_config(name, overrides)
    values = config_to_dict(config)
    if "output.folder" not in changed:
        values["output"]["folder"] = f"runs/{path.stem}"
    values["data"] |= {
        "train": config.data.train or "shards/train-{000000..000099}.tar",
        "val": config.data.val or "shards/val",
    }
    docs = {setting: text for setting, _, _, text in iter_settings(RunConfig)}
    lines = [
        f"# {path.stem}: {_first_comment(find_config(name))}",
        f"#   iwm check {path}",
        f"#   iwm train {path}",
        f"# Settings that this file does not contain have their values in {name}. To change one of those below,",
        "# remove the # in front of it; null means unset. `iwm train --help` explains all settings.",
        f"base: {name}",
    ]
    group = ""
    for setting in _SETTINGS:
        if setting.split(".")[0] != group:
            group = setting.split(".")[0]
            lines += ["", f"{group}:"]
        leaf = setting.split(".")[1]
        text = " ".join(docs[setting].split())
        lines += textwrap.wrap(text, _LINE_LENGTH, initial_indent="  # ", subsequent_indent="  # ")
        value = yaml.safe_dump({leaf: values[group][leaf]}, width=1000).strip()
        lines += [f"  {value}" if setting in changed else f"  # {value}"]
    return "\n".join(lines) + "\n"
