"""Signal runs of two ranks again and again: `python signalled_run.py KIND SHARDS FOLDER NUM_SIGNALS SEED LOG_EVERY`.

KIND is pretrain or finetune. It trains FOLDER/straight without interruption. Then it starts FOLDER/signalled, sends a
random signal to a random process at a random moment, and repeats this until the number of signals is reached; a last
start ends the run. It prints a JSON line for each signal.

Each start is a fork of this process, which has imported everything but started no threads. The fork plays the launcher:
it forks the ranks, passes on the signals that torchrun passes on, and ends the other ranks if one fails.
"""

import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from killed_run import WARM, step_on_disk, wait_for_moment

from fixtures.launchers import tiny_yaml
from fixtures.tar_files import TinyShards
from fixtures.tiny_finetuning import tiny_task, train_toy
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.runtime import distributed
from iwm_fast.runtime.preemption import EXIT_PREEMPTED, STOP_SIGNALS, PreemptedError
from iwm_fast.runtime.process import log_to_console, run_and_exit, watch_signals
from iwm_fast.runtime.run_status import read_status
from iwm_fast.train import train

assert WARM
NUM_RANKS = 2
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What a launcher and a scheduler wait before they kill what is left.
LAUNCHER_PATIENCE_S, SCHEDULER_PATIENCE_S = 10.0, 30.0


def pretrain(settings, folder):
    train([str(settings), f"output.folder={folder}", "resume=auto"], watch_signals())


def finetune(shards, log_every, folder):
    preemption = watch_signals()
    log_to_console()
    rank_info = distributed.start("cpu")
    task = tiny_task(shards, tune={"epochs": 16}, log_every=log_every, checkpoint_every=1, runtime={"loader": "dali"})
    try:
        train_toy(rank_info, shards, folder, task, preemption=preemption)
    except PreemptedError:
        raise SystemExit(EXIT_PREEMPTED) from None
    finally:
        distributed.stop()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def fork(function):
    """Run a function in a child process that ends with it, and return the child's process id."""
    child = os.fork()
    if child:
        return child
    try:
        function()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(1)


def launch(train_rank):
    """Do what torchrun does: fork the ranks, pass signals on, and end all ranks when one fails."""
    os.setsid()
    os.environ |= {"WORLD_SIZE": str(NUM_RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = []
    for rank in range(NUM_RANKS):
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(fork(partial(run_and_exit, train_rank)))

    def pass_on(number, _):
        for process in ranks:
            with suppress(ProcessLookupError):
                os.kill(process, number)

    for number in PASSED_ON:
        signal.signal(number, pass_on)
    code, deadline = 0, float("inf")
    while ranks:
        process, status = os.waitpid(-1, os.WNOHANG)
        if process:
            ranks.remove(process)
            if status and not code:
                code, deadline = os.waitstatus_to_exitcode(status), time.monotonic() + LAUNCHER_PATIENCE_S
                pass_on(signal.SIGTERM, None)
        elif time.monotonic() > deadline:
            pass_on(signal.SIGKILL, None)
        time.sleep(0.01)
    os._exit(abs(code))


def processes_of(session):
    """Return the ids of the running processes of a session, which are those of one start."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state, _, _, number = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(number) == session and state != "Z":
                found.append(int(entry.name))
    return found


def kill_all(session):
    for process in processes_of(session):
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def wait_for_end(launcher):
    """Wait for all processes of a start, kill those that do not end, and return the launcher's exit code."""
    deadline = time.monotonic() + SCHEDULER_PATIENCE_S
    is_reaped, status = False, 0
    while not is_reaped or processes_of(launcher):
        if not is_reaped:
            process, status = os.waitpid(launcher, os.WNOHANG)
            is_reaped = process != 0
        if time.monotonic() > deadline:
            kill_all(launcher)
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(status)


def signal_one(train_rank, folder, moments):
    """Start the run, signal one of its processes, and describe what is left."""
    launcher = fork(partial(launch, train_rank))
    wait_for_moment(folder, moments)
    time.sleep(moments.uniform(0.0, 0.05))
    running = sorted(processes_of(launcher))
    row = {"had_ended": not running}
    if running:
        victim, number = moments.choice(running), moments.choice((*STOP_SIGNALS, signal.SIGKILL))
        with suppress(ProcessLookupError):
            os.kill(victim, number)
        # A scheduler that is out of patience.
        is_killed = moments.random() < 0.25
        if is_killed:
            time.sleep(moments.uniform(0.0, 0.3))
            kill_all(launcher)
        row |= {"victim": running.index(victim), "of": len(running), "signal": number.name, "is_killed": is_killed}
    row["code"] = wait_for_end(launcher)
    saved, refused = checkpoints.read_newest(folder)
    refusals = [str(error) for error in refused.values()]
    return row | {"newest": saved.step if saved else 0, "refused": refusals, "status": read_status(folder)}


def main(kind, shards, folder, *numbers):
    num_signals, seed, log_every = map(int, numbers)
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    shards, folder = TinyShards(pattern=shards, folder=Path(shards).parent), Path(folder)
    output = {"log_every": log_every, "checkpoint_every": 1, "keep_last": 2, "action_log": True}
    settings = tiny_yaml(
        folder / "run.yaml", shards, optim={"epochs": 25}, runtime={"loader_threads": 1}, output=output
    )
    train_in = {"pretrain": partial(pretrain, settings), "finetune": partial(finetune, shards, log_every)}[kind]
    # A finetuning job has its own folder.
    runs = {name: folder / name / ("toy" if kind == "finetune" else "") for name in ("straight", "signalled")}
    moments = random.Random(seed)
    for _ in range(num_signals):
        print(json.dumps(signal_one(partial(train_in, folder / "signalled"), runs["signalled"], moments)), flush=True)
    for name, run_folder in runs.items():
        if code := wait_for_end_of_training(partial(train_in, folder / name)):
            sys.exit(f"{name}: a run that was not interrupted ended with {code} at step {step_on_disk(run_folder)}")


def wait_for_end_of_training(train_rank):
    launcher = fork(partial(launch, train_rank))
    return os.waitstatus_to_exitcode(os.waitpid(launcher, 0)[1])


if __name__ == "__main__":
    main(*sys.argv[1:])
