"""The task list of a multitask evaluation, a YAML file.

species:                 # any name
  label: cls             # label field in the shards: cls or json.FIELD
  weight: 1.0            # weight of its loss; optional
daytime:
  label: json.time_of_day
  classes: [day, night]  # optional; any other value in the shards is an error
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from iwm_fast.config.strict_yaml import read_yaml, resolve
from iwm_fast.config.values import convert
from iwm_fast.pipelines.config import require, require_label_field

# Name of the result row that averages over all tasks; no task may have it.
MEAN = "mean"


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One classification task."""

    name: str
    label: str
    """Label field in the shards: "cls" or "json.FIELD"."""
    weight: float = 1.0
    """Weight of its loss."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers; None: all values in the training shards."""


def read_task_list(path: str) -> tuple[TaskSpec, ...]:
    """Read a task list in the order of the file.

    Raises:
        FileNotFoundError: if the file does not exist.
        ValueError: if it contains no task, repeats a name or a label, or has an unknown key or an invalid value.
    """
    require(bool(path), "tasks", path, "name a YAML file with lines like `photograph: {label: cls}`")
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"tasks = {path!r} does not exist; name a YAML file with lines like `photograph: {{label: cls}}`"
        )
    tree = resolve(read_yaml(Path(path)))
    require(
        isinstance(tree, dict) and bool(tree),
        path,
        tree,
        "name at least one task, in lines like `photograph: {label: cls}`",
    )
    tasks = tuple(_parse_task(path, name, entry) for name, entry in tree.items())
    labels = [task.label for task in tasks]
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    require(not repeated, path, repeated, "name each label only once")
    return tasks


def _parse_task(path: str, name: Any, entry: Any) -> TaskSpec:
    is_word = isinstance(name, str) and re.fullmatch(r"(?!\d+$)[A-Za-z0-9][A-Za-z0-9_-]*", name) and name != MEAN
    require(bool(is_word), path, name, f"name tasks by letters, digits, dashes and underscores, and not {MEAN!r}")
    address = f"{path}: {name}"
    require(isinstance(entry, dict), address, entry, "hold `label: cls` or `label: json.FIELD`")
    keys = [item.name for item in fields(TaskSpec) if item.name != "name"]
    unknown = [key for key in entry if key not in keys]
    require(not unknown, address, unknown, f"have no keys other than {', '.join(keys)}")
    label, weight, classes = entry.get("label", ""), entry.get("weight", 1.0), entry.get("classes")
    require_label_field(f"{address}.label", label)
    weight = convert(f"{address}.weight", float, weight)
    require(weight > 0, f"{address}.weight", weight, "be a number above 0")
    is_list = classes is None or (
        isinstance(classes, list) and len({_class_name(value) for value in classes}) == len(classes) > 0
    )
    require(is_list, f"{address}.classes", classes, "list the name of each class once")
    names = None if classes is None else tuple(_class_name(value) for value in classes)
    return TaskSpec(name=name, label=label, weight=weight, classes=names)


def _class_name(value: Any) -> str:
    # Labels from .json members are named as in JSON, where booleans are true and false.
    return str(value).lower() if isinstance(value, bool) else str(value)
