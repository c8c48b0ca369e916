"""Kill a process that only writes checkpoints: `python killed_writer.py RUN_FOLDER NUM_KILLS SEED`.

Prints one JSON line per kill that describes the checkpoints on the disk.
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

RANK_INFO = RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))
NUM_VALUES = 250_000
KEEP_LAST = 2


@dataclass(frozen=True, kw_only=True)
class Kill:
    """The checkpoints on the disk after a kill."""

    published: int
    """Last step that the process reported as published, 0 if there is none."""
    newest: int
    """Step of the newest complete checkpoint."""
    refused: list[str]
    """Errors of the checkpoints that cannot be read."""
    num_unfinished: int
    num_checkpoints: int
    is_equal: bool
    """Whether the newest checkpoint holds the values that were written."""


def contents(step):
    return torch.arange(NUM_VALUES, dtype=torch.float32) * step


def write_until_killed(folder, first_step, report_fd):
    """Write checkpoints until the process is killed, and report each published step as 4 bytes."""
    config = RunConfig(output=OutputConfig(folder=str(folder), keep_last=KEEP_LAST))
    writer = CheckpointWriter(config, RANK_INFO, fingerprint={}, run_id="x")
    teacher = torch.empty(NUM_VALUES)
    for step in range(first_step, first_step + 1_000_000):
        teacher.copy_(contents(step))
        writer.write(
            engine_state={"weight/a": contents(step)}, teacher_state={"b": teacher}, step=step, applied_steps=step
        )
        # Training continues and changes the teacher while the checkpoint is being written.
        teacher.fill_(-1.0)
        writer.wait()
        os.write(report_fd, step.to_bytes(4, "big"))


def run_and_kill(folder, first_step, after_s):
    """Start a writing process, kill it after a time and return the checkpoints that it left."""
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        write_until_killed(folder, first_step, write_fd)
    os.close(write_fd)
    # The first kill waits for a complete checkpoint, so that there is always one to read.
    reports = os.read(read_fd, 4) if first_step == 1 else b""
    time.sleep(after_s)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while chunk := os.read(read_fd, 4096):
        reports += chunk
    os.close(read_fd)
    saved, refused = checkpoints.read_newest(folder)
    names = [path.name for path in (folder / "checkpoints").iterdir()]
    return Kill(
        published=int.from_bytes(reports[-4:], "big"),
        newest=saved.step,
        refused=[str(error) for error in refused.values()],
        num_unfinished=sum(name.startswith(".unfinished") for name in names),
        num_checkpoints=sum(name.startswith("step-") for name in names),
        is_equal=torch.equal(saved.engine_state["weight/a"], contents(saved.step))
        and torch.equal(saved.teacher_state["b"], contents(saved.step)),
    )


def main(folder, num_kills, seed):
    torch.set_num_threads(1)
    delays, step = random.Random(seed), 0
    for _ in range(num_kills):
        kill = run_and_kill(folder, step + 1, delays.uniform(0.0, 0.15))
        step = kill.newest
        print(json.dumps(asdict(kill)), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
