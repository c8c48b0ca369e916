"""Print losses without and with runtime.compile, in a process without jaxtyping's checks, which cannot be traced."""

import json
import sys
from dataclasses import replace
from pathlib import Path

from fixtures.tiny_pretraining import losses, tiny_run
from iwm_fast.runtime import distributed
from iwm_fast.runtime.process import end_process


class Shards:
    pattern = sys.argv[1]


if __name__ == "__main__":
    rank_info = distributed.start("cpu")
    config = tiny_run(Shards, Path("unused"), engine=sys.argv[2])
    compiled = replace(config, runtime=replace(config.runtime, compile=True))
    print(json.dumps([losses(rank_info, variant, steps=6) for variant in (config, compiled)]))
    distributed.stop()
    end_process()
