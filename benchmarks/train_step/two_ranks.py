"""Training steps on two ranks, each a process of its own: `python -m benchmarks.train_step.two_ranks`."""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.machine import PROJECT
from benchmarks.harness.timing import Failure
from benchmarks.train_step.engines import contestants_of_ranks
from benchmarks.train_step.measure import Comparison, StepTurn, compare
from benchmarks.train_step.workload import build_workload
from iwm_fast.runtime import distributed
from iwm_fast.runtime.process import end_process

NUM_RANKS = 2


def compare_on_ranks(folder: Path, device: torch.device, is_quick: bool, limit_s: float) -> Comparison:
    """Start the ranks, and return what rank 0 measured.

    Raises:
        RuntimeError: if a rank fails or they take too long, with the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, "result.json")
        command = [sys.executable, "-m", "benchmarks.train_step.two_ranks", "--data", str(folder), "--out", str(out)]
        command += ["--device", device.type, *(["--quick"] if is_quick else [])]
        _run(command, Path(temporary), limit_s)
        return _from_json(json.loads(out.read_text(encoding="utf-8")))


def _run(command: list[str], folder: Path, limit_s: float) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logs = [folder / f"rank-{rank}.log" for rank in range(NUM_RANKS)]
    processes = []
    for rank, log in enumerate(logs):
        ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": NUM_RANKS, "MASTER_PORT": port}
        environment = os.environ | {name: str(value) for name, value in ours.items()}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        with log.open("w") as file:
            processes.append(
                subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=file, stderr=subprocess.STDOUT)
            )
    try:
        codes = [process.wait(timeout=limit_s) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [124] * NUM_RANKS
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        ends = "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)
        raise RuntimeError(f"ranks ended with {codes}:\n{ends}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Be one rank of those that the environment describes; rank 0 writes the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step.two_ranks", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    rank_info = distributed.start(options.device)
    workload = build_workload(options.data, rank_info.device, options.quick)
    # written by one, before the others look
    distributed.broadcast_from_rank_zero(lambda: workload.pattern)
    found = compare(workload, contestants_of_ranks(), rank_info, has_time=lambda: True)
    if rank_info.rank == 0:
        options.out.write_text(json.dumps(_to_json(found)), encoding="utf-8")
    distributed.stop()


def _to_json(found: Comparison) -> dict[str, Any]:
    turns = {name: result.line if isinstance(result, Failure) else result for name, result in found.turns.items()}
    return {"turns": turns, "losses": found.losses, "kept_bytes": found.kept_bytes}


def _from_json(tree: dict[str, Any]) -> Comparison:
    turns = {
        name: Failure(result) if isinstance(result, str) else [StepTurn(*turn) for turn in result]
        for name, result in tree["turns"].items()
    }
    return Comparison(turns, tree["losses"], tree["kept_bytes"])


if __name__ == "__main__":
    main()
    end_process()
