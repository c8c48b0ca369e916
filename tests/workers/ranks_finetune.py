"""One rank of test_run.py: `python ranks_finetune.py SHARDS FOLDER` trains a toy until rank 1 fails at step 3."""

import sys
from pathlib import Path

from fixtures.tar_files import TinyShards
from fixtures.tiny_finetuning import train_toy
from iwm_fast.runtime import distributed
from iwm_fast.runtime.process import run_and_exit


def main() -> None:
    rank_info = distributed.start("cpu")

    def fail_at_step_3(batch):
        if rank_info.rank == 1 and batch.step == 3:
            raise OSError("rank 1 cannot continue")

    folder = Path(sys.argv[2])
    train_toy(rank_info, TinyShards(pattern=sys.argv[1], folder=folder), folder, watch=fail_at_step_3)


if __name__ == "__main__":
    run_and_exit(main)
