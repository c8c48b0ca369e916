"""A rank of test_precision.py, `python ranks_precision.py SHARDS FOLDER STAGE MICRO_BATCH_SIZE STEPS`.

It trains in bf16 with DeepSpeed, and rank 0 writes state and losses to FOLDER/state.safetensors.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from fixtures.tiny_pretraining import tiny_run, train
from iwm_fast.runtime import distributed
from iwm_fast.runtime.process import end_process


class Shards:
    pattern = sys.argv[1]


def main(folder, stage, micro_batch_size, steps):
    rank_info = distributed.start("cpu")
    config = tiny_run(
        Shards, folder, engine="deepspeed", zero_stage=stage, micro_batch_size=micro_batch_size, loader="torch"
    )
    config = replace(config, optim=replace(config.optim, precision="bf16"))
    components, reports = train(rank_info, config, steps)
    state = components.engine.state()
    losses = distributed.sum_over_ranks(torch.stack([report.loss for report in reports]))
    if rank_info.rank == 0:
        save_file({**state, "losses": losses}, folder / "state.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[2]), *map(int, sys.argv[3:]))
    distributed.stop()
    end_process()
