"""A run, its export and its action log as the first layout of the project (commit e678dd7) wrote them.

tests/fixtures/run_e678dd7 holds 16 images, four steps of a tiny model with a checkpoint after two and after four, the
export, an evaluation, and the views of step 1 rendered again by that commit.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import iwm_fast
from fixtures.paths import TESTS
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.commands.replay_step import replay
from iwm_fast.config.commands import ReplayConfig
from iwm_fast.config.evaluation import EvalData, MrrConfig
from iwm_fast.config.loading import load_config
from iwm_fast.evals.results import read_result
from iwm_fast.evals.retrieval.mrr import evaluate_mrr
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.train import run


@pytest.fixture
def kept(tmp_path):
    """Return a copy of the folder: using a run writes into it."""
    return shutil.copytree(TESTS / "fixtures" / "run_e678dd7", tmp_path / "kept")


def test_run_and_export_load_as_the_same_model(kept):
    trained, exported = iwm_fast.load(str(kept / "run")), iwm_fast.load(str(kept / "export"))
    assert trained.step == exported.step == 4
    for one, other in ((trained.encoder, exported.encoder), (trained.predictor, exported.predictor)):
        torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_training_resumes_and_ends_where_the_first_layout_ended(kept):
    before = read_metrics(kept / "run")
    shutil.rmtree(kept / "run" / "checkpoints" / "step-00000004")
    config = load_config(kept / "run" / "config.yaml")
    data = replace(config.data, train=str(kept / "tiny.tar"), val="")
    run(replace(config, resume="auto", data=data, output=replace(config.output, folder=str(kept / "run"))))
    newest = checkpoints.newest(kept / "run")
    assert newest is not None and newest.name == "step-00000004"
    expected = load_file(TESTS / "fixtures/run_e678dd7/run/checkpoints/step-00000004/model.safetensors")
    # the machine that wrote them may have added in another order
    torch.testing.assert_close(load_file(newest / "model.safetensors"), expected, rtol=1e-4, atol=1e-6)
    for old, new in zip(before, read_metrics(kept / "run"), strict=True):
        assert new["loss/prediction"] == pytest.approx(old["loss/prediction"], rel=1e-4)


def test_an_evaluation_gives_what_it_gave(kept):
    old = read_result(kept / "run" / "evaluations" / "mrr_default.json")
    data = EvalData(train=str(kept / "tiny.tar"), val=str(kept / "tiny.tar"))
    new = evaluate_mrr(MrrConfig(run=str(kept / "run"), num_images=4, bank_size=8, data=data))
    for before, after in zip(old.rows, new.rows, strict=True):
        assert (after.subject, after.metric) == (before.subject, before.metric)
        assert after.value == pytest.approx(before.value, abs=0.05)


def test_a_logged_step_is_rendered_again_to_the_bit(kept):
    replay(
        ReplayConfig(
            run=str(kept / "run"), step=1, format="tensors", shards=str(kept / "tiny.tar"), out=str(kept / "again")
        )
    )
    again, before = load_file(kept / "again"), load_file(kept / "replayed.safetensors")
    assert again.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(again[name], tensor), name
