"""A lab runs only commands that are not done, can be stopped and extended, and reports failures."""

import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest
import yaml

from fixtures.paths import TESTS
from iwm_fast.evals.results import Result, save_result
from iwm_fast.evaluate import EVALUATIONS, read_settings
from iwm_fast.lab.config import read_lab
from iwm_fast.lab.runner import is_done, iter_commands, list_cells, report_lab, run_lab
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines import demo_data
from iwm_fast.runtime.preemption import EXIT_PREEMPTED
from iwm_fast.runtime.run_status import read_status

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
    settings = read_settings(EVALUATIONS["knn"].settings, list(evaluate.arguments[2:]))
    result = Result(task="knn", name="knn", rows=(), step=step, seed=0, settings=asdict(settings))
    save_result(cell.folder, result)
    assert is_done(evaluate) == expected


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


def test_cells_that_were_trained_on_other_images_are_refused(write, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "DEMO_CROPS", {"train": 8, "val": 2})
    folder = tmp_path / "lab" / "cells" / "b-seed0"
    shutil.copytree(TESTS / "fixtures" / "run_e678dd7" / "run", folder)
    settings = {"data.train": f"{tmp_path}/data/train-{{000000..000007}}.tar"}
    with pytest.raises(ValueError, match=f"the run in {folder} was trained on other images than {tmp_path}/data/train"):
        run_lab(write(demo_data=True, settings=settings))
    assert not count_commands(tmp_path / "lab")


@pytest.mark.launcher
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
