"""A rank of test_online.py, `python ranks_online.py FOLDER TRAIN VAL`: evaluates, again without the VAL of rank 1."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from iwm_fast.evals.online import OnlineEvaluation
from iwm_fast.runtime import distributed
from iwm_fast.runtime.error_reporting import PeerFailedError, user_facing_errors
from iwm_fast.runtime.process import end_process
from iwm_fast.training.components import build_components

sys.path.insert(0, str(Path(__file__).parents[1]))

from fixtures.tar_files import TinyShards
from fixtures.tiny_pretraining import tiny_run


def main(folder, train, val):
    # At ZeRO stage 3, complete weights can be gathered only if all ranks take part.
    config = tiny_run(TinyShards(pattern=train, folder=folder), folder, engine="deepspeed", zero_stage=3)
    config = replace(config, data=replace(config.data, val=val), output=replace(config.output, evaluate_every=4))
    rank_info = distributed.start("cpu")
    trainer = build_components(config, rank_info)
    evaluation = OnlineEvaluation(config, trainer.shards, rank_info)
    state = torch.get_rng_state()
    evaluation.prepare()
    row = evaluation(trainer.teacher.state_dict(), trainer.engine.named_parameters("predictor."))
    assert torch.equal(torch.get_rng_state(), state)
    print(json.dumps({name: value for name, value in row.items() if not name.startswith("eval/time")}), flush=True)
    with pytest.raises(ZeroDivisionError if rank_info.rank == 1 else PeerFailedError):
        distributed.on_every_rank(lambda: 1 / (1 - rank_info.rank))
    distributed.on_every_rank(Path(val).unlink if rank_info.rank == 1 else lambda: None)
    evaluation(trainer.teacher.state_dict(), trainer.engine.named_parameters("predictor."))


if __name__ == "__main__":
    with user_facing_errors():
        main(Path(sys.argv[1]), *sys.argv[2:])
    end_process()
