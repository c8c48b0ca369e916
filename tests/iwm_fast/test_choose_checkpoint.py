"""`checkpoint=`: evaluations, exports and the Python API use an earlier checkpoint than the newest."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import iwm_fast
from fixtures.tiny_pretraining import tiny_run
from iwm_fast import cli
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.checkpoints.export import export
from iwm_fast.checkpoints.pretrained import read_pretrained_weights
from iwm_fast.config.commands import ExportConfig
from iwm_fast.config.evaluation import ImagineConfig, KnnConfig, MrrConfig
from iwm_fast.config.finetuning import FinetuneConfig
from iwm_fast.evals.finetuning.run import open_context
from iwm_fast.evals.probing.knn import evaluate_knn
from iwm_fast.evals.retrieval.mrr import evaluate_mrr
from iwm_fast.evals.retrieval.visualize import imagine
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.student import build_student
from iwm_fast.runtime.distributed import single_process
from iwm_fast.train import run


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory) -> Path:
    """Train a run with checkpoints of steps 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = tiny_run(tiny_shards, folder, loader="torch")
    run(replace(config, data=replace(config.data, val=tiny_shards.pattern)))
    return folder


@pytest.mark.parametrize("form", ["5", "step-00000005", "{run}/checkpoints/step-00000005"])
def test_a_step_or_a_path_chooses_the_checkpoint(trained, form):
    saved = checkpoints.read(trained / "checkpoints" / "step-00000005")
    model = iwm_fast.load(trained, checkpoint=form.format(run=trained))
    assert model.step == 5 and iwm_fast.load(trained, checkpoint=5).step == 5
    assert torch.equal(model.encoder.norm.weight, saved.teacher_state["norm.weight"])
    assert torch.equal(model.predictor.state_dict()["norm.weight"], saved.weights("predictor.")["norm.weight"])


def test_the_path_of_a_checkpoint_is_loaded_itself(trained, tmp_path):
    copy = shutil.copytree(trained / "checkpoints" / "step-00000010", tmp_path / "backup")
    assert iwm_fast.load(copy).step == iwm_fast.load(trained / "checkpoints" / "step-00000010").step == 10
    config = replace(iwm_fast.load(copy).config, init_from=str(copy))
    source = read_pretrained_weights(config, build_student(config, REFERENCE))
    assert source.remarks[0].endswith("step 10")


def test_an_unknown_checkpoint_is_refused_with_the_list_of_steps(trained, tmp_path):
    for checkpoint in (7, "7", trained):
        with pytest.raises(FileNotFoundError, match=r"has a checkpoint \(5, 10, 12\), or the folder of one, got '"):
            iwm_fast.load(trained, checkpoint=checkpoint)
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(FileNotFoundError, match=r"has a checkpoint \(none yet\)"):
        iwm_fast.load(tmp_path, checkpoint=5)


def test_a_damaged_checkpoint_that_was_chosen_is_not_replaced(trained, tmp_path):
    copy = shutil.copytree(trained, tmp_path / "run")
    (copy / "checkpoints" / "step-00000010" / "model.safetensors").write_bytes(b"damaged")
    assert iwm_fast.load(copy).step == 12
    with pytest.raises(CheckpointError, match=r"model\.safetensors is"):
        iwm_fast.load(copy, checkpoint=10)


def test_results_of_a_chosen_checkpoint_have_their_own_names(trained):
    newest = evaluate_mrr(MrrConfig(run=str(trained), num_images=2, bank_size=4))
    chosen = evaluate_mrr(MrrConfig(run=str(trained), num_images=2, bank_size=4, checkpoint="5"))
    knn = evaluate_knn(KnnConfig(run=str(trained), num_neighbors=1, checkpoint="5"))
    assert (newest.name, newest.step, chosen.step, knn.step) == ("mrr_default", 12, 5, 5)
    folder = trained / "evaluations"
    assert json.loads((folder / "mrr_default.json").read_text())["step"] == 12
    for name in ("mrr_default-step-00000005", "knn-step-00000005"):
        assert json.loads((folder / f"{name}.json").read_text())["step"] == 5
    assert (folder / "mrr_default-step-00000005_ranks.parquet").is_file()
    pictures = imagine(ImagineConfig(run=str(trained), num_images=1, bank_size=2, steps=2, checkpoint="5"))
    assert [path.name for path in pictures] == [
        "imagine-step-00000005.png", "imagine-step-00000005_sweeps.png", "imagine-step-00000005_plots.png",
        "imagine-step-00000005.html",
    ]  # fmt: skip


def test_networks_tuned_from_a_chosen_checkpoint_have_their_own_folder(trained):
    task = FinetuneConfig(run=str(trained), checkpoint="5", name="weak")
    context = open_context("finetune", task, iwm_fast.load(trained, checkpoint=5), single_process("cpu"), None)
    assert context.folder == trained / "evaluations" / "finetune_weak-step-00000005"


def test_a_chosen_checkpoint_is_exported_and_an_export_has_no_other(trained, tmp_path):
    folder = export(ExportConfig(run=str(trained), to=str(tmp_path / "export"), checkpoint="5"))
    assert iwm_fast.load(folder).step == iwm_fast.load(folder, checkpoint=5).step == 5
    assert "trained with iwm-fast for 5 steps" in (folder / "README.md").read_text()
    with pytest.raises(ValueError, match=r"is an export of step 5 and has no other, got checkpoint=12"):
        iwm_fast.load(folder, checkpoint=12)


def test_commands_name_the_run_if_they_are_given_a_checkpoint(trained, capsys):
    path = trained / "checkpoints" / "step-00000010"
    for command in ("evaluate knn", "imagine", "export to=x", "report"):
        with pytest.raises(SystemExit):
            cli.main([*command.split(), f"run={path}"])
        assert f"set run={trained}, and checkpoint=10 where" in capsys.readouterr().err
    assert {entry.name for entry in path.iterdir()} == {
        "model.safetensors", "state.json", "config.yaml", "manifest.json"
    }  # fmt: skip
