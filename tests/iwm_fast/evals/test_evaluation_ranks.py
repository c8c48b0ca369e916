"""MRR, roll-outs and planning on two ranks give the results of one rank."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import parquet

from fixtures.launchers import CHILD_ENVIRONMENT, free_port
from fixtures.paths import WORKERS
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.config.evaluation import MrrConfig, PlanConfig, RolloutConfig
from iwm_fast.evals.planning.evaluate import evaluate_plan
from iwm_fast.evals.retrieval.mrr import evaluate_mrr
from iwm_fast.evals.retrieval.rollout import evaluate_rollout
from iwm_fast.train import run

WORKER = WORKERS / "ranks_evals.py"
# Seven images give two ranks unequal shares.
MRR = {"num_images": 7, "bank_size": 5, "device": "cpu"}
ROLLOUT = MRR | {"max_actions": 2}
PLAN = {"num_images": 7, "num_train_images": 9, "population": 8, "rounds": 2, "device": "cpu"}


def run_on_two_ranks(folder: Path) -> list[str]:
    """Run the worker on two ranks and return what each of them prints."""
    port = free_port()
    pipes: dict = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = []
    for rank in "01":
        launch = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, str(WORKER), str(folder), *map(json.dumps, (MRR, ROLLOUT, PLAN))]
        ranks.append(subprocess.Popen(command, env=os.environ | CHILD_ENVIRONMENT | launch, **pipes))
    printed = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    return [out for out, _ in printed]


@pytest.mark.multi_rank
def test_two_ranks_give_the_results_and_files_of_one(tiny_shards, tmp_path):
    config = tiny_run(tiny_shards, tmp_path / "run", loader="torch")
    optim = replace(config.optim, epochs=1.0, warmup_epochs=0.0)
    run(replace(config, data=replace(config.data, val=tiny_shards.pattern), optim=optim))
    shutil.copytree(tmp_path / "run", tmp_path / "shared")
    first, second = run_on_two_ranks(tmp_path / "shared")
    folder = str(tmp_path / "run")
    alone = [
        evaluate_mrr(MrrConfig(run=folder, **MRR)),
        evaluate_rollout(RolloutConfig(run=folder, **ROLLOUT)),
        evaluate_plan(PlanConfig(run=folder, **PLAN)),
    ]
    assert first == second == "".join(f"{result.rows}\n" for result in alone)
    for name in ("mrr_default.parquet", "mrr_default_ranks.parquet", "rollout_default.parquet", "plan.parquet"):
        tables = [parquet.read_table(tmp_path / run / "evaluations" / name) for run in ("run", "shared")]
        assert tables[0] == tables[1], name
