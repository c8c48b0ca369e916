"""Kill a process that does nothing but write checkpoints: `python killed_writer.py RUN_FOLDER NUM_KILLS SEED`.

It prints one JSON line per kill: what was on the disk then.
"""

import json
import os
import random
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.async_writer import CheckpointWriter
from iwm_fast.config.run import OutputConfig, RunConfig
from iwm_fast.runtime.distributed import RankInfo

PLACE = RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
NUM_VALUES = 250_000
KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What one kill left."""

    published: int
    """Step that the process had said was published, 0 for none."""
    newest: int
    """Step of the newest whole checkpoint."""
    refused: list[str]
    num_unfinished: int
    num_checkpoints: int
    is_equal: bool
    """Whether the newest one holds what was written."""


def contents(step):
    return torch.arange(NUM_VALUES, dtype=torch.float32) * step


def write_for_ever(folder, first_step, said):
    config = RunConfig(output=OutputConfig(folder=str(folder), keep_last=KEPT))
    writer = CheckpointWriter(config, PLACE, fingerprint={}, run_id="x")
    teacher = torch.empty(NUM_VALUES)
    for step in range(first_step, first_step + 1_000_000):
        teacher.copy_(contents(step))
        writer.write(
            engine_state={"weight/a": contents(step)}, teacher_state={"b": teacher}, step=step, applied_steps=step
        )
        # training goes on and changes it
        teacher.fill_(-1.0)
        writer.wait()
        os.write(said, step.to_bytes(4, "big"))


def kill_one(folder, first_step, after_s):
    hears, said = os.pipe()
    child = os.fork()
    if child == 0:
        write_for_ever(folder, first_step, said)
    os.close(said)
    # the first one is whole before anything is killed
    heard = os.read(hears, 4) if first_step == 1 else b""
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while part := os.read(hears, 4096):
        heard += part
    os.close(hears)
    saved, refused = checkpoints.read_newest(folder)
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    return Kill(
        published=int.from_bytes(heard[-4:], "big"),
        newest=saved.step,
        refused=[str(error) for error in refused.values()],
        num_unfinished=sum(name.startswith(".unfinished") for name in names),
        num_checkpoints=sum(name.startswith("step-") for name in names),
        is_equal=torch.equal(saved.engine_state["weight/a"], contents(saved.step))
        and torch.equal(saved.teacher_state["b"], contents(saved.step)),
    )


def main(folder, num_kills, seed):
    torch.set_num_threads(1)
    moments, step = random.Random(seed), 0
    for _ in range(num_kills):
        kill = kill_one(folder, step + 1, moments.uniform(0.0, 0.15))
        step = kill.newest
        print(json.dumps(asdict(kill)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
