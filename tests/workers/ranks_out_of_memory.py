"""A rank of test_out_of_memory.py: `python ranks_out_of_memory.py SHARDS FOLDER RANKS`.

It trains, and the memory of RANKS, such as 1 or 01, is exhausted in the third step.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from iwm_fast.engines.torch_engine import TorchEngine
from iwm_fast.runtime.process import run_and_exit
from iwm_fast.train import run

sys.path.insert(0, str(Path(__file__).parents[1]))

from fixtures.tar_files import TinyShards
from fixtures.tiny_pretraining import tiny_run


def main(shards, folder, ranks):
    config = tiny_run(TinyShards(pattern=shards, folder=Path()), Path(folder), loader="torch")
    config = replace(config, output=replace(config.output, checkpoint_every=1))
    forward, calls = TorchEngine.forward, []

    def fail_in_the_third_step(engine, batch):
        calls.append(1)
        if len(calls) == 3 and str(torch.distributed.get_rank()) in ranks:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(engine, batch)

    TorchEngine.forward = fail_in_the_third_step
    run(config)


if __name__ == "__main__":
    run_and_exit(partial(main, *sys.argv[1:]))
