"""A rank of test_evaluation_ranks.py, `python ranks_evals.py RUN MRR ROLLOUT PLAN` with JSON: prints the rows."""

import json
import sys

import torch

from iwm_fast.config.evaluation import MrrConfig, PlanConfig, RolloutConfig
from iwm_fast.evals.planning.evaluate import evaluate_plan
from iwm_fast.evals.retrieval.mrr import evaluate_mrr
from iwm_fast.evals.retrieval.rollout import evaluate_rollout
from iwm_fast.runtime import distributed
from iwm_fast.runtime.error_reporting import user_facing_errors
from iwm_fast.runtime.process import end_process


def main(folder: str, mrr: str, rollout: str, plan: str) -> None:
    torch.set_num_threads(1)
    rank_info = distributed.start("cpu")
    print(evaluate_mrr(MrrConfig(run=folder, **json.loads(mrr)), rank_info).rows, flush=True)
    print(evaluate_rollout(RolloutConfig(run=folder, **json.loads(rollout)), rank_info).rows, flush=True)
    print(evaluate_plan(PlanConfig(run=folder, **json.loads(plan)), rank_info).rows, flush=True)
    distributed.stop()


if __name__ == "__main__":
    with user_facing_errors():
        main(*sys.argv[1:])
    end_process()
