"""A run with data.max_samples uses only the first samples of its shards."""

import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from fixtures.launchers import torchrun
from fixtures.paths import WORKERS
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.commands.replay_step import replay_step
from iwm_fast.config.commands import ReplayConfig
from iwm_fast.config.evaluation import KnnConfig
from iwm_fast.config.fingerprint import fingerprint
from iwm_fast.config.run import OptimConfig
from iwm_fast.evals.probing.knn import evaluate_knn
from iwm_fast.pipelines.action_log.files import read_rows
from iwm_fast.pipelines.config import DataConfig
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.train import run
from iwm_fast.training.loaders import open_training_shards


def test_max_samples_limits_training_evaluation_and_replay(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run", loader="torch")
    config = replace(
        config,
        data=replace(config.data, max_samples=24, val=tiny_shards.pattern),
        optim=replace(config.optim, epochs=2.0),
        output=replace(config.output, action_log=True),
    )
    # 2 epochs of 24 samples in batches of 16.
    assert run(config).step == 3
    seen = read_rows(tmp_path / "run" / "actions", 0, 3).column("sample").to_pylist()
    assert sorted(seen) == sorted([*range(24), *range(24)])
    assert evaluate_knn(KnnConfig(run=str(tmp_path / "run"))).details["num_train"] == 24
    assert replay_step(ReplayConfig(run=str(tmp_path / "run"), step=2)).is_file()


def test_one_batch_can_be_overfitted(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run", loader="torch")
    optim = OptimConfig(global_batch_size=16, epochs=3.0, warmup_epochs=0.0, precision="fp32")
    assert run(replace(config, data=replace(config.data, max_samples=16), optim=optim)).step == 3


def test_a_max_samples_above_the_number_of_samples_is_refused(tiny_shards):
    with pytest.raises(ValueError, match=r"data\.max_samples must be at most the 48 samples of data\.train, .* got 49"):
        open_training_shards(DataConfig(train=tiny_shards.pattern, max_samples=49))


def test_another_number_of_samples_changes_the_fingerprint(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path)
    few = replace(config, data=replace(config.data, max_samples=24))
    digests = [open_training_shards(settings.data).content_digest for settings in (config, few)]
    assert digests[0] != digests[1]
    assert fingerprint(config, digests[0])["data.max_samples"] is None
    assert fingerprint(few, digests[1])["data.max_samples"] == 24


@pytest.mark.multi_rank
@pytest.mark.slow
@pytest.mark.parametrize("place", ["in memory", "on disk"])
def test_the_first_rank_of_a_machine_looks_at_the_shards_and_the_others_map_its_index(tiny_shards, tmp_path, place):
    copies = Path(shutil.copytree(tiny_shards.folder, tmp_path / "copies"))
    in_an_hour = time.time() + 3600
    for path in copies.glob("*.tar") if place == "in memory" else ():
        os.utime(path, (in_an_hour, in_an_hour))
    # The indexes of the shards, which the one of the data set is made of.
    open_shards(str(copies))
    command = torchrun("--nproc-per-node", "4", target=str(WORKERS / "ranks_shards.py"))
    result = subprocess.run([*command, str(copies)], check=False, capture_output=True, text=True)
    assert result.returncode == 0 and place in result.stdout, result.stderr
