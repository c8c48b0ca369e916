"""Files of a run that an early version of the project (commit e678dd7) wrote: checkpoints, export and action log.

tests/fixtures/run_e678dd7 holds 16 images, a run of four steps of a tiny model with checkpoints after two and four
steps, its export, an evaluation, and the views of step 1 as that commit rendered them.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import iwm_fast
from fixtures.paths import TESTS
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.commands.replay_step import replay_step
from iwm_fast.config.commands import ReplayConfig
from iwm_fast.config.evaluation import EvalDataConfig, MrrConfig
from iwm_fast.config.loading import load_config
from iwm_fast.evals.results import read_result
from iwm_fast.evals.retrieval.mrr import evaluate_mrr
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.train import run


@pytest.fixture
def old_files(tmp_path):
    """Return a copy of the folder, because using a run writes to it."""
    return shutil.copytree(TESTS / "fixtures" / "run_e678dd7", tmp_path / "copy")


def test_run_and_export_load_as_the_same_model(old_files):
    trained, exported = iwm_fast.load(str(old_files / "run")), iwm_fast.load(str(old_files / "export"))
    assert trained.step == exported.step == 4
    for from_run, from_export in ((trained.encoder, exported.encoder), (trained.predictor, exported.predictor)):
        torch.testing.assert_close(from_run.state_dict(), from_export.state_dict(), rtol=0, atol=0)


def test_training_resumes_and_ends_with_the_same_weights(old_files):
    before = read_metrics(old_files / "run")
    shutil.rmtree(old_files / "run" / "checkpoints" / "step-00000004")
    config = load_config(old_files / "run" / "config.yaml")
    data = replace(config.data, train=str(old_files / "tiny.tar"), val="")
    run(replace(config, resume="auto", data=data, output=replace(config.output, folder=str(old_files / "run"))))
    newest = checkpoints.find_newest_folder(old_files / "run")
    assert newest is not None and newest.name == "step-00000004"
    expected = load_file(TESTS / "fixtures/run_e678dd7/run/checkpoints/step-00000004/model.safetensors")
    # Pixels have changed by a fraction of a grey level since, and Adam's steps show small differences enlarged.
    torch.testing.assert_close(load_file(newest / "model.safetensors"), expected, rtol=1e-4, atol=1e-3)
    for old, new in zip(before, read_metrics(old_files / "run"), strict=True):
        assert new["loss/prediction"] == pytest.approx(old["loss/prediction"], rel=1e-4)


def test_an_evaluation_has_the_same_result(old_files):
    old = read_result(old_files / "run" / "evaluations" / "mrr_default.json")
    data = EvalDataConfig(train=str(old_files / "tiny.tar"), val=str(old_files / "tiny.tar"))
    new = evaluate_mrr(MrrConfig(run=str(old_files / "run"), num_images=4, bank_size=8, data=data))
    absolute = [row for row in new.rows if not row.metric.endswith("_difference_readout")]
    for before, after in zip(old.rows, absolute, strict=True):
        assert (after.subject, after.metric) == (before.subject, before.metric)
        assert after.value == pytest.approx(before.value, abs=0.05)


def test_a_logged_step_is_rendered_within_rounding(old_files):
    replay_step(
        ReplayConfig(
            run=str(old_files / "run"),
            step=1,
            format="tensors",
            shards=str(old_files / "tiny.tar"),
            out=str(old_files / "again"),
        )
    )
    again, before = load_file(old_files / "again"), load_file(old_files / "replayed.safetensors")
    assert again.keys() == before.keys()
    for name, tensor in before.items():
        if name.endswith("_view"):
            # Resizing and photometry have been rounded differently since.
            difference = (again[name].int() - tensor.int()).abs().float()
            assert difference.mean() < 0.5 and difference.quantile(0.99) <= 2, name
        else:
            assert torch.equal(again[name], tensor), name
