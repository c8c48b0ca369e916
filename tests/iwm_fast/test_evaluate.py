"""The entry point of all evaluations, from the command line and under a launcher."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pyarrow import parquet

from fixtures.launchers import deepspeed, torchrun
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.cli import main
from iwm_fast.config.loading import iter_settings
from iwm_fast.evals.results import read_result
from iwm_fast.evaluate import EVALUATIONS
from iwm_fast.train import run


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_shards) -> Path:
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    run(tiny_run(tiny_shards, folder))
    return folder


def data(tiny_shards) -> list[str]:
    return [f"data.train={tiny_shards.pattern}", f"data.val={tiny_shards.pattern}"]


def test_every_evaluation_has_documented_settings():
    for name, evaluation in EVALUATIONS.items():
        texts = {setting: text for setting, _, _, text in iter_settings(evaluation.settings)}
        assert {"run", "data.val", "seed"} <= texts.keys() and all(texts.values()), name


QUICK = {
    "mrr": ["num_images=2", "bank_size=4", "families=[jitter]"],
    "rollout": ["num_images=2", "bank_size=4", "max_actions=2"],
    "sensitivity": ["num_images=4", "bank_size=2"],
    "knn": [],
    "linear": ["epochs=2"],
    "attentive": ["epochs=1", "lrs=[1e-3]"],
    "plan": ["num_images=2", "num_train_images=8", "population=8", "rounds=2"],
    "finetune": ["arms=attentive", "tune.epochs=1", "tune.warmup_epochs=0", "tune.global_batch_size=16",
                 "tune.precision=fp32", "runtime.engine=plain", "runtime.device=cpu"],
    "decode": ["controls=false", "decoder.dim=16", "tune.steps=2", "tune.global_batch_size=16", "tune.precision=fp32",
               "runtime.engine=plain", "runtime.device=cpu"],
}  # fmt: skip


@pytest.mark.parametrize("task", QUICK)
def test_an_evaluation_prints_a_table_and_writes_rows(task, trained, tiny_shards, capsys):
    command = [task] if task in ("plan", "decode") else ["evaluate", task]
    main([*command, f"run={trained}", *data(tiny_shards), *QUICK[task]])
    printed = capsys.readouterr().out
    (path,) = (trained / "evaluations").glob(f"{task}*.json")
    result = read_result(path)
    assert result.task == task and result.step == 12 and result.rows and result.settings["run"] == str(trained)
    assert result.name in printed and str(result.rows[0].metric)[:8] in printed
    rows = parquet.read_table(path.with_suffix(".parquet")).to_pylist()
    assert [row["value"] for row in rows] == [row.value for row in result.rows]
    assert {row["task"] for row in rows} == {task} and {row["step"] for row in rows} == {12}


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_an_impossible_evaluation_gives_one_message(trained, tiny_shards, capsys, tmp_path):
    assert "run must name the folder of a training run" in refused(capsys, "evaluate", "linear")
    assert "is not a run folder" in refused(capsys, "evaluate", "linear", f"run={tmp_path}")
    assert "did you mean 'epochs'" in refused(capsys, "evaluate", "linear", f"run={trained}", "epoch=1")
    assert "unknown command 'evaluate lineal'" in refused(capsys, "evaluate", "lineal", f"run={trained}")
    assert "data.val must name validation shards" in refused(capsys, "evaluate", "mrr", f"run={trained}")
    message = refused(capsys, "evaluate", "linear", f"run={trained}", *data(tiny_shards), "data.label=json.colour")
    assert "json" in message and tiny_shards.folder.name in message
    assert "source and target must both name image files" in refused(capsys, "plan", f"run={trained}", "source=a.jpg")


@pytest.mark.slow
@pytest.mark.launcher
@pytest.mark.parametrize("launcher", [deepspeed, torchrun])
def test_two_ranks_of_a_launcher_give_the_results_of_one_process(launcher, trained, tiny_shards):
    settings = [f"run={trained}", *data(tiny_shards), *QUICK["mrr"], "device=cpu"]
    start = launcher(target="iwm_fast.evaluate")
    done = subprocess.run([*start, "mrr", *settings], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    path = trained / "evaluations" / "mrr_default.json"
    together = json.loads(path.read_text())["rows"]
    assert done.stdout.count("mrr_default, step 12") == 1
    subprocess.run([sys.executable, "-m", "iwm_fast.cli", "evaluate", "mrr", *settings], check=True, timeout=300)
    assert [row["value"] for row in json.loads(path.read_text())["rows"]] == [row["value"] for row in together]
