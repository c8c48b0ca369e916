"""The YAML task list: how it is read, and which files are refused."""

from pathlib import Path

import pytest

import iwm_fast
from iwm_fast.evals.multitask.task_list import TaskSpec, read_task_list

TASKS = """
tint: {label: json.look.tint, weight: 2, classes: [red, 7, true]}
count: {label: cls}
"""


def read(tmp_path, text):
    path = tmp_path / "tasks.yaml"
    path.write_text(text)
    return read_task_list(str(path))


def test_tasks_are_read_in_the_order_of_the_file(tmp_path):
    first = TaskSpec(name="tint", label="json.look.tint", weight=2.0, classes=("red", "7", "true"))
    assert read(tmp_path, TASKS) == (first, TaskSpec(name="count", label="cls"))


def test_the_bundled_file_names_three_tasks():
    path = Path(iwm_fast.__file__).parent / "configs" / "tasks" / "demo.yaml"
    assert [task.label for task in read_task_list(str(path))] == ["cls", "json.hue_bin", "json.quadrant"]


INVALID = {
    "": "must name at least one task, in lines like `photograph: {label: cls}`, got None",
    "- cls": r"must name at least one task, .* got \['cls'\]",
    "a: {label: cls}\nb: {label: cls}": r"must name each label only once, got \['cls'\]",
    "a: {label: cls}\na: {label: json.b}": "tasks.yaml is not accepted in line 2: 'a' occurs twice, first in line 1",
    "a: cls": "tasks.yaml: a must hold `label: cls` or `label: json.FIELD`, got 'cls'",
    "a: {weight: 1}": "tasks.yaml: a.label must be cls or json.NAME, got ''",
    "a: {label: json.}": "a.label must be cls or json.NAME, got 'json.'",
    "a: {label: cls, wieght: 2}": r"a must have no keys other than label, weight, classes, got \['wieght'\]",
    "a: {label: cls, weight: 0}": "a.weight must be a number above 0, got 0",
    "a: {label: cls, weight: true}": "a.weight must be a finite number, got True",
    "a: {label: cls, weight: .inf}": "a.weight must be a finite number, got '.inf'",
    "a: {label: cls, classes: [1, '1']}": "a.classes must list the name of each class once",
    "a: {label: cls, classes: []}": "a.classes must list the name of each class",
    "mean: {label: cls}": "must name tasks by letters, digits, dashes and underscores, and not 'mean', got 'mean'",
    "a/b: {label: cls}": "must name tasks by letters",
    "3: {label: cls}": "must name tasks by letters",
    "a: {label: cls": "is not valid YAML",
}


@pytest.mark.parametrize("text", INVALID)
def test_an_invalid_file_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=INVALID[text]):
        read(tmp_path, text)


def test_a_missing_file_is_reported_with_an_example(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"tasks = '.*nothing.yaml' does not exist; name a YAML file"):
        read_task_list(str(tmp_path / "nothing.yaml"))
    with pytest.raises(ValueError, match="tasks must name a YAML file with lines like"):
        read_task_list("")
