"""Start and stop the process group; sums over ranks; agree on a flag.

The environment that torchrun, the DeepSpeed launcher and our own launcher set decides how many processes there are;
without it there is one, with a process group of its own, which DeepSpeed needs too.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Num
from torch import Tensor

from iwm_fast.runtime.error_reporting import PeerFailedError

Value = TypeVar("Value")

log = logging.getLogger(__name__)

ENVIRONMENT = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# the others wait while rank 0 looks at every sample or writes a checkpoint; DeepSpeed's 10 minutes kill that
TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class RankInfo:
    """Which of the cooperating processes this is, and where it computes."""

    rank: int
    """Number of the process, 0 .. world_size - 1."""
    local_rank: int
    """Number of the process on its machine; also the number of its GPU."""
    world_size: int
    """Number of processes."""
    device: torch.device
    """Where tensors live."""


def start(device_setting: Literal["auto", "cpu", "cuda"], timeout_s: float = TIMEOUT_S) -> RankInfo:
    """Join the process group that the environment describes, or make one of a single process.

    A rank that waits for the others longer than the timeout takes them for hung and raises.

    On a CPU torch is limited to one thread unless OMP_NUM_THREADS says otherwise.

    Raises:
        RuntimeError: if the environment is incomplete or wrong, there is no GPU but one was asked for, or a process
            group exists already.
    """
    if dist.is_initialized():
        raise RuntimeError("a process group exists already; call distributed.stop() before starting another")
    rank, local_rank, world_size = _read_environment()
    device = choose_device(device_setting, local_rank)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    log.info("computing on %s (runtime.device=%s)", name, device_setting)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # launchers leave it unset and ranks then fight for the cores: 470 -> 88 ms per step, 2 ranks on 2 cores
        torch.set_num_threads(1)
    _join(rank, world_size, device, timedelta(seconds=timeout_s))
    return RankInfo(rank=rank, local_rank=local_rank, world_size=world_size, device=device)


def _join(rank: int, world_size: int, device: torch.device, timeout: timedelta) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size == 1:
        # a store inside the process needs no free port
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    log.info("rank %d of %d meets the others at %s", rank, world_size, address)
    # binding the GPU lets a barrier know its device
    bound = device if device.type == "cuda" else None
    dist.init_process_group(backend, rank=rank, world_size=world_size, timeout=timeout, device_id=bound)


def set_collective_timeout(timeout_s: float) -> None:
    """Give process groups that a library has created meanwhile the same timeout as ours, in seconds."""
    internals = dist.distributed_c10d
    # torch 2.11 does not have the public name yet
    set_timeout = getattr(dist, "set_timeout", None) or internals._set_pg_timeout
    for group in list(internals._world.pg_map):
        set_timeout(timedelta(seconds=timeout_s), group)


def _read_environment() -> tuple[int, int, int]:
    given = [name for name in ENVIRONMENT if name in os.environ]
    if not given:
        return 0, 0, 1
    missing = [name for name in ENVIRONMENT if name not in os.environ]
    if missing:
        raise RuntimeError(
            f"the environment has {', '.join(given)} but not {', '.join(missing)}; start with torchrun, which sets all "
            f"of them, or unset them for one process"
        )
    numbers = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if not all(text.isdigit() for text in numbers.values()):
        raise RuntimeError(f"RANK, LOCAL_RANK and WORLD_SIZE must be whole numbers, got {numbers}; start with torchrun")
    rank, local_rank, world_size = (int(text) for text in numbers.values())
    if not local_rank <= rank < world_size:
        raise RuntimeError(f"must satisfy LOCAL_RANK <= RANK < WORLD_SIZE, got {numbers}; start with torchrun")
    return rank, local_rank, world_size


def choose_device(setting: str, local_rank: int = 0) -> torch.device:
    """Return where this process computes: `auto` takes a GPU if there is one.

    Raises:
        RuntimeError: if a GPU is asked for and there is none for this local rank.
    """
    num_gpus = torch.cuda.device_count() if setting != "cpu" and torch.cuda.is_available() else 0
    if setting == "cpu" or (setting == "auto" and num_gpus == 0):
        return torch.device("cpu")
    if local_rank >= num_gpus:
        raise RuntimeError(
            f"runtime.device={setting} needs a GPU for local rank {local_rank}, but torch {torch.__version__} finds "
            f"{num_gpus}; start one process per GPU, check the driver, or set runtime.device=cpu"
        )
    return torch.device("cuda", local_rank)


def single_process(device_setting: str) -> RankInfo:
    """Return the ranks of a launch that consists of this process alone; needs no process group.

    Raises:
        RuntimeError: if a GPU is asked for and there is none, or this process is one of several ranks.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(f"this is one of {dist.get_world_size()} ranks; pass the RankInfo that start() returned")
    return RankInfo(rank=0, local_rank=0, world_size=1, device=choose_device(device_setting))


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_ranks(tensor: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """Return the sum over all ranks, with the same bits on each; collective. Without a process group: a copy."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def all_gather(part: Num[Tensor, "size"]) -> Num[Tensor, "total"]:
    """Return the parts of all ranks, which are of equal size, concatenated in order of rank; collective."""
    if not dist.is_initialized():
        return part.detach().clone()
    whole = part.new_empty(dist.get_world_size() * part.numel())
    dist.all_gather_into_tensor(whole, part.detach().contiguous())
    return whole


def copy_from_rank_zero(tensor: Num[Tensor, "*shape"]) -> None:
    """Overwrite in place with what rank 0 has; collective."""
    if dist.is_initialized():
        dist.broadcast(tensor.detach(), src=0)


def rank_zero_only(act: Callable[[], Value]) -> Value | None:
    """Call a function on rank 0 and return its value there, None on the other ranks; collective.

    Raises:
        Exception: on rank 0, whatever the function raised.
        PeerFailedError: on the other ranks, if it raised.
    """
    if not dist.is_initialized():
        return act()
    value: Value | None = None
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            value = act()
        # whatever it was, the other ranks must not go on waiting
        except Exception as error:
            failure = error
    has_failed = [failure is not None]
    dist.broadcast_object_list(has_failed, src=0)
    if failure is not None:
        raise failure
    if has_failed[0]:
        raise PeerFailedError("rank 0 failed and reports why")
    return value


def broadcast_from_rank_zero(decide: Callable[[], Value]) -> Value:
    """Return on every rank what a function returns on rank 0; collective.

    For what must not differ between ranks, such as what a shared disk shows. Errors are those of `rank_zero_only`.
    """
    if not dist.is_initialized():
        return decide()
    decision: list[Any] = [rank_zero_only(decide)]
    dist.broadcast_object_list(decision, src=0)
    return decision[0]


def gather_objects(value: Value) -> list[Value]:
    """Return the value of each rank, in order of rank; collective, and slow: for what happens seldom."""
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Return, for each flag, whether it is true on at least one rank; collective, so it is a barrier too."""
    votes = torch.tensor([int(flag) for flag in flags], device=device)
    return [count > 0 for count in sum_over_ranks(votes).tolist()]
