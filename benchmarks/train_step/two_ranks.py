"""Compare training steps on two ranks; `python -m benchmarks.train_step.two_ranks` runs one of them."""

import argparse
import os
import pickle
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.harness.machine import PROJECT
from benchmarks.train_step.engines import TWO_RANK_ENGINES
from benchmarks.train_step.measure import Comparison, compare
from benchmarks.train_step.workload import build_workload
from iwm_fast.runtime import distributed
from iwm_fast.runtime.process import end_process

NUM_RANKS = 2


def compare_on_ranks(folder: Path, device: torch.device, quick: bool, limit_s: float) -> Comparison:
    """Start a process per rank, and return the comparison that rank 0 measured.

    Raises:
        RuntimeError: if a rank fails or exceeds the time limit, with the last output of all ranks.
    """
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, "result.pickle")
        command = [sys.executable, "-m", "benchmarks.train_step.two_ranks", "--data", str(folder), "--out", str(out)]
        command += ["--device", device.type, *(["--quick"] if quick else [])]
        _run(command, Path(temporary), limit_s)
        return pickle.loads(out.read_bytes())


def _run(command: list[str], folder: Path, limit_s: float) -> None:
    with socket.socket() as probe:
        # The kernel chooses a free port for port 0.
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    logs = [folder / f"rank-{rank}.log" for rank in range(NUM_RANKS)]
    # One thread per rank, as torchrun sets it, so that the ranks do not compete for the same cores.
    rendezvous = {"WORLD_SIZE": str(NUM_RANKS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = []
    for rank, log in enumerate(logs):
        environment = os.environ | rendezvous | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        with log.open("w") as file:
            process = subprocess.Popen(command, cwd=PROJECT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        processes.append(process)
    try:
        codes = [process.wait(timeout=limit_s) for process in processes]
    except subprocess.TimeoutExpired:
        codes = [124] * NUM_RANKS
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(codes):
        output = "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)
        raise RuntimeError(f"ranks exited with {codes}:\n{output}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the rank that the environment describes; rank 0 writes the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step.two_ranks", description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    rank_info = distributed.start(options.device)
    workload = build_workload(options.data, rank_info.device, options.quick)
    # Rank 0 writes the shards before the other rank looks for them.
    distributed.broadcast_from_rank_zero(lambda: workload.pattern)
    comparison = compare(workload, TWO_RANK_ENGINES, rank_info)
    if rank_info.rank == 0:
        options.out.write_bytes(pickle.dumps(comparison))
    distributed.stop()


if __name__ == "__main__":
    main()
    # Threads of gloo and DeepSpeed can abort the interpreter's cleanup, although the result is written by now.
    end_process()
