"""A rank of test_resume.py, `python ranks_resume.py RUN.yaml SETTING ...`, with other settings than the other rank.

It trains, resumes and trains on. Then rank 1 cannot read the checkpoint.
"""

import sys

import pytest

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.config.loading import load_config
from iwm_fast.runtime import distributed
from iwm_fast.runtime.error_reporting import PeerFailedError
from iwm_fast.runtime.process import end_process
from iwm_fast.training.components import build_components
from iwm_fast.training.pretraining import PretrainTask
from iwm_fast.training.resume import find_resume_point
from iwm_fast.training.trainer import Trainer


def refuse(folder):
    raise CheckpointError(f"{folder} cannot be read")


def main(path, *settings):
    rank_info = distributed.start("cpu")
    for epochs in (1, 2):
        config = load_config(path, [*settings, f"optim.epochs={epochs}", "resume=extend"])
        state = Trainer(PretrainTask(build_components(config, rank_info))).run()
    print(f"trained to step {state.step}", flush=True)
    if rank_info.rank == 1:
        checkpoints.read = refuse
    with pytest.raises(CheckpointError if rank_info.rank == 1 else PeerFailedError):
        find_resume_point(config, lambda _: None)


if __name__ == "__main__":
    main(*sys.argv[1:])
    distributed.stop()
    end_process()
