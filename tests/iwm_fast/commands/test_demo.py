"""The demo recognises a run that was trained on the images of another version."""

import shutil
from dataclasses import replace

import pytest

from fixtures.paths import TESTS
from iwm_fast.commands import demo as demo_command
from iwm_fast.commands.demo import choose_num_ranks, demo
from iwm_fast.config.loading import load_run_config
from iwm_fast.pipelines import demo_data
from iwm_fast.training.resume import require_same_shards


@pytest.fixture
def old_run(tmp_path):
    """A run that was trained on tiny.tar, which lies beside it."""
    return shutil.copytree(TESTS / "fixtures" / "run_e678dd7", tmp_path / "old") / "run"


def test_the_demo_names_a_run_that_was_trained_on_other_images(old_run, tmp_path, monkeypatch):
    monkeypatch.setattr(demo_data, "DEMO_CROPS", {"train": 8, "val": 2})
    monkeypatch.setattr(demo_command, "train_with_deepspeed", lambda _: pytest.fail("trained"))
    shards = f"{tmp_path}/data/train-{{000000..000007}}.tar"
    files = sorted(old_run.rglob("*"))
    with pytest.raises(
        ValueError, match=f"the run in {old_run} was trained on other images than {tmp_path}/data/train"
    ):
        demo([f"data.train={shards}", f"output.folder={old_run}"])
    assert sorted(old_run.rglob("*")) == files


def test_only_other_samples_are_refused(old_run, tiny_shards, tmp_path):
    config = load_run_config(old_run)
    config = replace(config, output=replace(config.output, folder=str(old_run)))
    require_same_shards(replace(config, data=replace(config.data, train=str(old_run.with_name("tiny.tar")))))
    other = replace(config.data, train=tiny_shards.pattern)
    require_same_shards(replace(config, data=replace(other, restart_epoch=True)))
    require_same_shards(replace(config, data=other, output=replace(config.output, folder=str(tmp_path / "new"))))
    with pytest.raises(ValueError, match="other images"):
        require_same_shards(replace(config, data=other))


@pytest.mark.parametrize("num_gpus", range(17))
def test_the_demos_batches_divide_by_its_ranks_whatever_the_number_of_gpus(num_gpus):
    num_ranks = choose_num_ranks(num_gpus)
    assert 1 <= num_ranks <= max(num_gpus, 2) and 64 % num_ranks == 32 % num_ranks == 0
    # More than half of up to eight GPUs are used.
    assert 2 * num_ranks > min(num_gpus, 8)
