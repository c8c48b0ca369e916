"""Kill a training run repeatedly: `python killed_run.py RUN.yaml STRAIGHT_FOLDER KILLED_FOLDER NUM_KILLS SEED`.

It trains one run without interruption and kills a second one, for which it prints a JSON line per kill with the state
of the disk. Each start is a fork of this process, which has imported all modules but started no threads.
"""

import json
import os
import random
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

# Modules that a run imports only when it needs them are imported here, so that forks need not do it.
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.config.loading import load_config
from iwm_fast.engines import deepspeed_engine
from iwm_fast.pipelines import dali_loader
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.train import run

WARM = (deepspeed_engine, dali_loader)
PATIENCE_S = 120


@dataclass(frozen=True, kw_only=True)
class Kill:
    """The state of the disk after a kill."""

    newest: int
    """Step of the newest undamaged checkpoint, 0 for none."""
    refused: list[str]
    num_unfinished: int
    had_ended: bool
    """Whether the run had finished before it could be killed."""


def start_fork(config):
    """Start the run in a child process and return its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        # A session of its own makes the run and its children one process group, which can be killed together.
        os.setsid()
        run(config, Preemption())
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(config):
    _, status = os.waitpid(start_fork(config), 0)
    if status:
        sys.exit(f"an uninterrupted run ended with status {status}")


def step_on_disk(folder):
    newest = checkpoints.find_newest_folder(folder)
    return checkpoints.parse_step(newest) if newest else 0


def unfinished_folders(folder):
    return list((folder / "checkpoints").glob(".unfinished-*"))


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            sys.exit("the run writes no checkpoints")
        time.sleep(0.0005)


def wait_for_moment(folder, moments):
    """Wait for a random moment during the start, a step or, half of the time, the writing of a checkpoint."""
    kind = moments.choice(("start", "step", "save", "save"))
    if kind == "start":
        time.sleep(moments.uniform(0.0, 2.0))
        return
    goal = step_on_disk(folder) + moments.randint(1, 3)
    wait_until(lambda: step_on_disk(folder) >= goal)
    if kind == "save":
        wait_until(lambda: unfinished_folders(folder))
    # A tiny run writes a checkpoint within a few milliseconds.
    time.sleep(moments.uniform(0.0, 0.002 if kind == "save" else 0.2))


def kill_one(config, moments):
    folder = Path(config.output.folder)
    child = start_fork(config)
    wait_for_moment(folder, moments)
    had_ended = os.waitpid(child, os.WNOHANG)[0] != 0
    if not had_ended:
        # The child may not have created its group yet, and has no children then.
        with suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    saved, refused = checkpoints.read_newest(folder)
    return Kill(
        newest=saved.step if saved else 0,
        refused=[str(error) for error in refused.values()],
        num_unfinished=len(unfinished_folders(folder)),
        had_ended=had_ended,
    )


def main(settings, straight, killed, num_kills, seed):
    torch.set_num_threads(1)
    finish(load_config(settings, [f"output.folder={straight}"]))
    config = load_config(settings, [f"output.folder={killed}", "resume=auto"])
    moments = random.Random(seed)
    for _ in range(num_kills):
        print(json.dumps(asdict(kill_one(config, moments))), flush=True)
    finish(config)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))
