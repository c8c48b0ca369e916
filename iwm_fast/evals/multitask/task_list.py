"""The tasks that one predictor is to learn, named in a YAML file.

species:                 # a name of your choice
  label: cls             # what stands in the shards: cls, or json.FIELD
  weight: 1.0            # of its loss; optional
daytime:
  label: json.time_of_day
  classes: [day, night]  # optional: anything else in the shards is an error
"""

import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from iwm_fast.pipelines.config import check, check_label_field

# what tells rows of several tasks from those of one
MEAN = "mean"


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One classification task."""

    name: str
    label: str
    """cls, or json.FIELD."""
    weight: float = 1.0
    """Of its loss."""
    classes: tuple[str, ...] | None = None
    """Names of the classes in the order of their numbers; None: what the training shards hold."""


def read_task_list(path: str) -> tuple[TaskSpec, ...]:
    """Read the tasks in the order of the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it names no tasks, one twice, two with the same label, or something that a task does not have.
    """
    check(bool(path), "tasks", path, "name a YAML file of tasks, such as `photograph: {label: cls}`")
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no tasks file {path!r}; give tasks=FILE, YAML with lines like `photograph: {{label: cls}}`"
        )
    text = Path(path).read_text(encoding="utf-8")
    try:
        tree, root = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    is_map = isinstance(tree, dict) and bool(tree)
    check(is_map, path, tree, "name at least one task, in lines like `photograph: {label: cls}`")
    assert root is not None
    # YAML's own reader keeps the last of several
    _refuse_repeated(path, "task", [key.value for key, _ in root.value])
    tasks = tuple(_task(path, name, given) for name, given in tree.items())
    _refuse_repeated(path, "label", [task.label for task in tasks])
    return tasks


def _refuse_repeated(path: str, what: str, values: list[str]) -> None:
    repeated = sorted({value for value in values if values.count(value) > 1})
    check(not repeated, path, repeated, f"name each {what} once; leave one of the two out")


def _task(path: str, name: Any, given: Any) -> TaskSpec:
    is_word = isinstance(name, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name) and name != MEAN
    check(bool(is_word), path, name, f"name tasks by letters, digits, dashes and underscores, and none {MEAN!r}")
    where = f"{path}: {name}"
    check(isinstance(given, dict), where, given, "hold `label: cls` or `label: json.FIELD`")
    known = [item.name for item in fields(TaskSpec) if item.name != "name"]
    unknown = [key for key in given if key not in known]
    check(not unknown, where, unknown, f"have no other entries than {', '.join(known)}")
    label, weight, classes = given.get("label", ""), given.get("weight", 1.0), given.get("classes")
    check_label_field(f"{where}.label", label)
    is_weight = isinstance(weight, int | float) and not isinstance(weight, bool) and 0 < weight < float("inf")
    check(is_weight, f"{where}.weight", weight, "be a number above 0")
    is_list = classes is None or (
        isinstance(classes, list) and len({_text(one) for one in classes}) == len(classes) > 0
    )
    check(is_list, f"{where}.classes", classes, "list the names of the classes once each")
    names = None if classes is None else tuple(_text(one) for one in classes)
    return TaskSpec(name=name, label=label, weight=float(weight), classes=names)


def _text(name: Any) -> str:
    # as labels are named: true and false as in JSON
    return str(name).lower() if isinstance(name, bool) else str(name)
