"""The YAML file of a lab: how it is read, and what is refused before anything runs."""

from pathlib import Path

import pytest
import yaml

import iwm_fast
from iwm_fast.config.loading import load_config
from iwm_fast.evaluate import EVALUATIONS, read_settings
from iwm_fast.lab.config import ResultSelector, read_lab
from iwm_fast.lab.runner import iter_commands, list_cells, run_lab

CURVES = {"text": "t", "x_label": "x", "y_label": "y", "x": [1, 2], "lines": {"line": ["a m s x", "b m s x"]}}


@pytest.fixture
def write(tmp_path):
    """Function that writes a lab file with changes and returns its path."""
    (tmp_path / "base.yaml").write_text("{}")

    def act(**changes):
        tree = {
            "folder": str(tmp_path / "lab"),
            "base": str(tmp_path / "base.yaml"),
            "settings": {"optim.epochs": 2, "views.crop.scale": [0.3, 1.0]},
            "seeds": [3, 4],
            "cells": {"a": {}, "b": {"model.predictor.conditioning": "none"}},
            "evaluations": [{"task": "mrr", "cells": ["a"], "settings": {"bank_size": 8}}, {"task": "knn"}],
            "claims": {"c": {"text": "t", "paper": "p", "compare": [["a mrr_default jitter mrr", "b m x y accuracy"]]}},
        }  # fmt: skip
        path = tmp_path / "lab.yaml"
        path.write_text(yaml.safe_dump({name: value for name, value in (tree | changes).items() if value is not None}))
        return path

    return act


def read(path):
    return read_lab(path, set(EVALUATIONS))


def test_a_lab_is_read(write):
    lab = read(write())
    assert lab.settings == ("optim.epochs=2", "views.crop.scale=[0.3, 1.0]") and lab.seeds == (3, 4)
    assert lab.cells == {"a": (), "b": ("model.predictor.conditioning=none",)}
    assert [(evaluation.task, evaluation.cells, evaluation.settings) for evaluation in lab.evaluations] == [
        ("mrr", ("a",), ("bank_size=8",)),
        ("knn", ("a", "b"), ()),
    ]
    (claim,) = lab.claims
    assert claim.compare[0][1] == ResultSelector(cell="b", result="m", subject="x y", metric="accuracy")
    assert not lab.has_demo_data and lab.workers is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"folders": "x"}, "keys of .*must be among base, cells, claims.*got .'folders'"),
        ({"cells": None}, "must have the key cells"),
        ({"seeds": [1, 1]}, "seeds must list at least one seed and none twice"),
        ({"seeds": 3}, "seeds must be a list of whole numbers, got 3"),
        ({"seeds": [0, 1.5]}, "seeds must be a list of whole numbers"),
        ({"workers": 0}, "workers must be at least 1 or unset"),
        ({"workers": "many"}, "workers must be a whole number, or null, got 'many'"),
        ({"demo_data": "maybe"}, "demo_data must be true or false, got 'maybe'"),
        ({"cells": ["a"]}, "cells must hold"),
        ({"cells": {}}, "cells must hold at least one cell"),
        ({"evaluations": {"task": "mrr"}}, "evaluations must hold a list"),
        ({"claims": ["c"]}, "claims must hold"),
        ({"claims": {"c": {"text": "t", "paper": "p", "compare": "a"}}}, "hold pairs"),
        ({"folder": ["x"]}, "folder must be text"),
        ({"cells": {"a": ["x"]}}, "cells.a must hold"),
        ({"evaluations": [{"task": "mrrr"}]}, "task of evaluations must be one of"),
        ({"evaluations": [{"task": "mrr", "cells": ["z"]}]}, "cells of evaluation mrr must be among a, b"),
        ({"claims": {"c": {"text": "t"}}}, "claims.c must have compare, paper, text"),
        (
            {"claims": {"c": {"text": "t", "paper": "p", "compare": [["z m s x", "a m s x"]]}}},
            "cell of claims.*must be among a, b, got 'z m s x'",
        ),
        ({"curves": {"k": CURVES | {"x": [1, 0]}}}, "curves.k.x must list values above 0"),
        ({"curves": {"k": CURVES | {"x": [1]}}}, "curves.k.lines must hold one result for each of 1 x.*'line': 2"),
        (
            {"curves": {"k": CURVES | {"lines": {"line": ["a m s x", "z m s x"]}}}},
            "cell of claims or curves.*'z m s x'",
        ),
        (
            {"curves": {"k": CURVES | {"lines": {"line": ["a m s x", "a m"]}}}},
            "curves.k.lines must be of the form CELL",
        ),
        ({"curves": {"k": {"text": "t"}}}, "curves.k must have lines, text, x, x_label, y_label"),
        ({"claims": {"c": {"text": "t", "paper": "p", "compare": [["a m s", "a m s x"]]}}}, "CELL RESULT SUBJECT"),
        ({"claims": {"c": {"text": "t", "paper": "p", "compare": [["a m s x"]]}}}, "hold pairs"),
        ({"claims": {"c": {"text": "t", "paper": "p", "compare": [], "margin": -1}}}, "margin must be at least 0"),
    ],
)
def test_invalid_labs_are_refused(write, changes, message):
    with pytest.raises(ValueError, match=message):
        read(write(**changes))


def test_missing_and_broken_files_are_reported(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the lab file .* does not exist"):
        read(tmp_path / "absent.yaml")
    with pytest.raises(FileNotFoundError, match=r"the run file 'other\.yaml' does not exist"):
        read(write(base="other.yaml"))
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not valid YAML"):
        read(tmp_path / "broken.yaml")


def test_a_lab_that_is_like_itself_is_refused(write):
    path = write()
    path.write_text(f"like: {path}")
    with pytest.raises(ValueError, match="like must not lead back to the same file"):
        read(path)


def test_a_lab_whose_folder_cannot_be_written_is_refused_before_anything_is_written(write, tmp_path):
    path = write(folder=str(tmp_path / "lab.yaml" / "x"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match="folder must be a path that can be written"):
        run_lab(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_lab_inherits_from_another_what_it_does_not_set(write, tmp_path):
    changes = {"like": str(write()), "folder": "elsewhere", "settings": {"optim.epochs": 4}, "workers": 6}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(changes))
    first, other = read(write()), read(tmp_path / "other.yaml")
    assert (str(other.folder), other.workers) == ("elsewhere", 6)
    assert other.settings == ("optim.epochs=4", "views.crop.scale=[0.3, 1.0]")
    assert (other.cells, other.evaluations, other.claims) == (first.cells, first.evaluations, first.claims)


@pytest.mark.parametrize("name", ["lab_cpu", "lab_cpu_worth_keeping", "lab_actions", "lab_objects", "lab_gpu"])
def test_all_commands_of_the_shipped_labs_have_valid_settings(name, monkeypatch):
    monkeypatch.chdir(Path(iwm_fast.__file__).parent.parent)
    lab = read(Path("iwm_fast", "configs", f"{name}.yaml"))
    assert len(lab.seeds) >= 3
    measured = set()
    for cell in list_cells(lab)[: len(lab.cells)]:
        train, *evaluations = iter_commands(lab, cell)
        config = load_config(train.arguments[1], train.arguments[2:])
        for command in evaluations:
            read_settings(EVALUATIONS[command.name].settings, list(command.arguments[2:]))
            measured.add((cell.name, command.name))
        has_predictor = config.model.predictor.depth > 0
        assert has_predictor or not {"mrr", "finetune"} & {command.name for command in evaluations}
    selectors = [selector for claim in lab.claims for pair in claim.compare for selector in pair]
    compared = {(selector.cell, selector.result) for selector in selectors}
    assert {(cell, result.partition("_")[0]) for cell, result in compared} <= measured


@pytest.mark.parametrize("name", ["lab_cpu", "lab_cpu_worth_keeping"])
def test_the_labs_on_the_demo_segment_all_photographs_of_its_maps(name, monkeypatch):
    monkeypatch.chdir(Path(iwm_fast.__file__).parent.parent)
    lab = read(Path("iwm_fast", "configs", f"{name}.yaml"))
    segmented = [evaluation.settings for evaluation in lab.evaluations if evaluation.task == "segment"]
    # The maps hold the numbers 0 to 16 of the photographs.
    assert lab.has_demo_data and segmented and all("num_classes=17" in settings for settings in segmented)
