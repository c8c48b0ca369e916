"""A lab runs only commands that are not done, can be stopped and extended, and reports failures."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import torch
import yaml

from fixtures.paths import TESTS
from iwm_fast.config.loading import save_config
from iwm_fast.evals.results import Result, Row, save_result
from iwm_fast.evaluate import EVALUATIONS, read_settings
from iwm_fast.lab.config import read_lab
from iwm_fast.lab.runner import (
    is_done,
    iter_commands,
    list_cells,
    report_lab,
    require_all_done,
    run_lab,
    training_config,
    visible_gpus,
    write_results,
)
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines import demo_data
from iwm_fast.runtime.preemption import EXIT_PREEMPTED
from iwm_fast.runtime.run_status import read_status, write_status

BASE = {
    "views": {"size": 16, "blur": {"sigma": [0.1, 1.0]}},
    "model": {"encoder": {"dim": 16, "depth": 1, "num_heads": 1, "patch_size": 4},
              "predictor": {"dim": 16, "depth": 1, "num_heads": 1}},
    "optim": {"global_batch_size": 16, "epochs": 1, "warmup_epochs": 0, "precision": "fp32"},
    "runtime": {"engine": "plain", "device": "cpu", "loader_threads": 1},
    "output": {"log_every": 1},
}  # fmt: skip
MRR = {"task": "mrr", "settings": {"num_images": 2, "bank_size": 4, "families": ["jitter"], "device": "cpu"}}
CLAIM = {"text": "It listens.", "paper": "0.8", "compare": [["a mrr_default jitter mrr", "b mrr_default jitter mrr"]]}


@pytest.fixture
def write(tmp_path, tiny_shards):
    """Function that writes a lab file with changes and returns its path."""
    base = BASE | {"data": {"train": tiny_shards.pattern, "val": tiny_shards.pattern}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def act(**changes):
        tree = {
            "folder": str(tmp_path / "lab"),
            "base": str(tmp_path / "base.yaml"),
            "seeds": [0],
            "workers": 2,
            "cells": {"a": {}, "b": {"model.predictor.conditioning": "none"}},
            "evaluations": [MRR],
            "claims": {"conditioning": CLAIM},
        }
        (tmp_path / "lab.yaml").write_text(yaml.safe_dump(tree | changes))
        return tmp_path / "lab.yaml"

    return act


def imitate_training(command):
    """Leave in the cell's folder what says that it has been trained for 8 steps."""
    (command.cell.folder / "checkpoints" / "step-00000008").mkdir(parents=True)
    save_config(training_config(command), command.cell.folder / "config.yaml")
    write_status(command.cell.folder, "finished")


def imitate_evaluation(command, name, value=0.5, step=8):
    """Write a result of the command's settings into the cell's folder."""
    settings = asdict(read_settings(EVALUATIONS[command.name].settings, list(command.arguments[2:])))
    rows = (Row(subject="jitter", metric="mrr", value=value),)
    save_result(
        command.cell.folder, Result(task=command.name, name=name, rows=rows, step=step, seed=0, settings=settings)
    )


def count_commands(folder):
    return {path.parent.name: path.read_text().count("$ iwm") for path in folder.glob("cells/*/lab.log")}


def test_cells_are_ordered_by_seed_and_commands_have_their_settings(write):
    lab = read_lab(write(seeds=[0, 1], settings={"optim.epochs": 2}), set(EVALUATIONS))
    cells = list_cells(lab)
    assert [cell.folder.name for cell in cells] == ["a-seed0", "b-seed0", "a-seed1", "b-seed1"]
    train, evaluate = iter_commands(lab, cells[3])
    assert train.arguments[0] == "train" and train.arguments[-1] == "resume=auto"
    assert {"optim.epochs=2", "model.predictor.conditioning=none", "seed=1"} <= set(train.arguments)
    assert evaluate.arguments[:2] == ("evaluate", "mrr") and "bank_size=4" in evaluate.arguments
    assert not is_done(train) and not is_done(evaluate)


def test_the_seed_is_inserted_into_the_settings_of_evaluations(write):
    knn = {"task": "knn", "settings": {"data.train": "few-{seed}-{000000..000001}.tar"}}
    lab = read_lab(write(seeds=[0, 3], evaluations=[knn]), set(EVALUATIONS))
    _, evaluate = iter_commands(lab, list_cells(lab)[2])
    assert "data.train=few-3-{000000..000001}.tar" in evaluate.arguments


@pytest.mark.parametrize(("chosen", "step", "expected"), [("", 4, False), ("", 8, True), ("4", 4, True)])
def test_a_result_is_outdated_by_newer_checkpoints_unless_it_names_its_own(write, chosen, step, expected):
    lab = read_lab(write(evaluations=[{"task": "knn", "settings": {"checkpoint": chosen}}]), set(EVALUATIONS))
    cell = list_cells(lab)[0]
    _, evaluate = iter_commands(lab, cell)
    (cell.folder / "checkpoints" / "step-00000008").mkdir(parents=True)
    imitate_evaluation(evaluate, "knn", step=step)
    assert is_done(evaluate) == expected


def test_only_results_of_the_labs_settings_are_reported_and_the_others_are_counted(write, tmp_path, caplog):
    def reported(**changes):
        caplog.clear()
        write_results(read_lab(write(**changes), set(EVALUATIONS)))
        return [(row["cell"], row["value"]) for row in json.loads((tmp_path / "lab" / "lab.json").read_text())["rows"]]

    larger = {"task": "mrr", "settings": MRR["settings"] | {"bank_size": 8}}
    for evaluation, value, cells in ((MRR, 0.5, "ab"), (larger, 0.6, "a")):
        lab = read_lab(write(evaluations=[evaluation]), set(EVALUATIONS))
        for cell in list_cells(lab):
            train, evaluate = iter_commands(lab, cell)
            if not cell.folder.exists():
                imitate_training(train)
            if cell.name in cells:
                imitate_evaluation(evaluate, "mrr_default", value)
    # The cell b has not been evaluated again yet.
    assert reported(evaluations=[larger]) == [("a", 0.6)]
    assert "left out: 0 of cells whose training is not finished with the lab's settings, and 1 of other" in caplog.text
    assert reported() == [("b", 0.5)]
    # A cell whose training is not finished does not hide the others.
    write_status(tmp_path / "lab" / "cells" / "b-seed0", "running")
    assert reported(evaluations=[larger]) == [("a", 0.6)]
    assert reported(evaluations=[larger], settings={"optim.epochs": 2}) == []
    assert "left out: 2 of cells whose training is not finished" in caplog.text


@pytest.mark.parametrize(("depth", "expected"), [(0, False), (1, True)])
def test_another_micro_batch_is_another_training_with_vicreg_terms_only(write, depth, expected):
    def training(**changes):
        lab = read_lab(write(settings={"model.predictor.depth": depth} | changes), set(EVALUATIONS))
        return next(iter_commands(lab, list_cells(lab)[0]))

    imitate_training(training())
    # The batch has 16 images.
    assert is_done(training(**{"runtime.micro_batch_size": 16}))
    assert is_done(training(**{"runtime.micro_batch_size": 8})) == expected


def test_an_evaluation_whose_result_was_replaced_by_another_one_of_its_cell_is_named(write):
    knn = [{"task": "knn", "cells": ["a"], "settings": {"num_neighbors": number}} for number in (10, 20)]
    lab = read_lab(write(cells={"a": {}}, claims={}, evaluations=knn), set(EVALUATIONS))
    train, *evaluations = iter_commands(lab, list_cells(lab)[0])
    imitate_training(train)
    for evaluate in evaluations:
        imitate_evaluation(evaluate, "knn")
    with pytest.raises(RuntimeError, match=r"(?s)a, seed 0: knn .*num_neighbors=10\).*same name.*another cell"):
        require_all_done(lab)


def test_workers_use_the_gpus_that_the_lab_was_given(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ["0", "1"]
    for given in ("2,3", "GPU-8932f937, MIG-1f2e3d4c"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
        assert visible_gpus() == given.replace(" ", "").split(",")
    # An invalid number ends the list.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,-1,4")
    assert visible_gpus() == ["2", "3"]


@pytest.mark.slow
@pytest.mark.launcher
def test_a_lab_is_run_judged_not_repeated_and_extended(write, tmp_path):
    page = run_lab(write())
    folder = tmp_path / "lab"
    results = json.loads((folder / "lab.json").read_text())
    measured = {(row["cell"], row["seed"], row["subject"]) for row in results["rows"]}
    assert measured == {("a", 0, "jitter"), ("b", 0, "jitter")}
    # Machine and commit are listed without repetitions.
    assert len(results["machine"]) == len(results["commit"]) == 1 and all(results["machine"] + results["commit"])
    # A claim is undecided with a single seed.
    assert results["verdicts"] == {"conditioning": "undecided"}
    assert "It listens." in page.read_text() and (folder / "claims.png").stat().st_size > 1000
    assert count_commands(folder) == {"a-seed0": 2, "b-seed0": 2}
    # Another cell, and another evaluation of an existing cell, are added.
    run_lab(write(cells={"a": {}, "b": {"model.predictor.conditioning": "none"}, "c": {"optim.lr": 1e-4}},
                  evaluations=[MRR, {"task": "knn", "cells": ["a"]}]))  # fmt: skip
    assert count_commands(folder) == {"a-seed0": 3, "b-seed0": 2, "c-seed0": 2}
    assert report_lab(folder) == page and "knn" in page.read_text()
    # The second evaluation replaces the result of the first one.
    knn = [{"task": "knn", "cells": ["a"], "settings": {"num_neighbors": number}} for number in (10, 20)]
    with pytest.raises(RuntimeError, match="a, seed 0: knn has run, but its result"):
        run_lab(write(cells={"a": {}}, evaluations=knn, claims={}))


def test_cells_that_were_trained_on_other_images_than_the_demo_are_refused(write, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "DEMO_CROPS", {"train": 8, "val": 2})
    folder = tmp_path / "lab" / "cells" / "b-seed0"
    shutil.copytree(TESTS / "fixtures" / "run_e678dd7" / "run", folder)
    settings = {"data.train": f"{tmp_path}/data/train-{{000000..000007}}.tar"}
    with pytest.raises(ValueError, match=f"the run in {folder} was trained on other images than {tmp_path}/data/train"):
        run_lab(write(demo_data=True, settings=settings))
    assert not count_commands(tmp_path / "lab")


def test_cells_that_were_trained_on_other_images_are_refused_without_demo_data_too(write, tmp_path):
    shutil.copytree(TESTS / "fixtures" / "run_e678dd7" / "run", tmp_path / "lab" / "cells" / "b-seed0")
    with pytest.raises(ValueError, match="was trained on other images than"):
        run_lab(write())
    assert not count_commands(tmp_path / "lab")


@pytest.mark.launcher
@pytest.mark.slow
def test_a_failed_cell_is_reported_with_its_log_and_the_others_are_run_once(write, tmp_path):
    path = write(cells={"a": {}, "bad": {"model.predictor.num_heads": 5}}, claims={})
    with pytest.raises(
        RuntimeError, match=r"(?s)bad, seed 0: train exited with code 2.*num_heads must divide.*to resume"
    ):
        run_lab(path)
    assert read_status(tmp_path / "lab" / "cells" / "a-seed0")["state"] == "finished"
    assert "a" in (tmp_path / "lab" / "report.html").read_text()
    # Without the bad cell, only the evaluation that the good one lacks is run.
    run_lab(write(cells={"a": {}}, evaluations=[MRR, {"task": "knn", "cells": ["a"]}], claims={}))
    assert count_commands(tmp_path / "lab") == {"a-seed0": 3, "bad-seed0": 1}
    assert "knn" in (tmp_path / "lab" / "report.html").read_text()


@pytest.mark.launcher
@pytest.mark.slow
def test_a_stopped_lab_lets_its_runs_save_before_it_exits(write, tmp_path):
    path = write(settings={"optim.epochs": 4000, "output.checkpoint_every": 100000}, evaluations=[], claims={})
    lab = subprocess.Popen([sys.executable, "-m", "iwm_fast.cli", "lab", str(path)], stderr=subprocess.PIPE, text=True)
    folders = [tmp_path / "lab" / "cells" / f"{name}-seed0" for name in "ab"]
    deadline = time.monotonic() + 120
    while not all(len(read_metrics(folder)) > 2 for folder in folders):
        assert lab.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    lab.send_signal(signal.SIGTERM)
    _, output = lab.communicate(timeout=120)
    assert lab.returncode == EXIT_PREEMPTED and "run the same command again to resume" in output
    states = [read_status(folder)["state"] for folder in folders]
    assert states == ["preempted"] * 2
    # Another schedule needs another run, so the lab refuses to continue this one.
    with pytest.raises(RuntimeError, match="other settings"):
        run_lab(write(settings={"optim.epochs": 2}, evaluations=[], claims={}))
