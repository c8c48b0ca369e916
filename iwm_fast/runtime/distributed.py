"""The process group: start and stop it, and exchange values between its ranks.

The environment variables that torchrun, the DeepSpeed launcher and `srun` scripts set decide how many processes there
are. Without them there is one process, which still gets a process group because DeepSpeed requires one.
"""

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Num
from torch import Tensor
from torch.distributed import PrefixStore, rendezvous  # pyright: ignore[reportPrivateImportUsage]

from iwm_fast.runtime.error_reporting import PeerFailedError
from iwm_fast.runtime.preemption import PreemptedError
from iwm_fast.runtime.rank_agreement import require_same_settings

Value = TypeVar("Value")

log = logging.getLogger(__name__)

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

# The other ranks wait while rank 0 validates every sample or writes a checkpoint. DeepSpeed's default of
# 10 minutes, which NCCL shares, would end such a run.
TIMEOUT_S = 3600.0


class ProcessGroupError(Exception):
    """The ranks of a launch cannot find each other; the message names the address and the remedy."""


@dataclass(frozen=True)
class RankInfo:
    """Which process of the launch this is, and the device it computes on."""

    rank: int
    """Number of the process among all processes of the launch, 0 .. world_size - 1."""
    local_rank: int
    """Number of the process on its machine, which is also the number of its GPU."""
    world_size: int
    """Number of processes of the launch."""
    device: torch.device
    """Device of the networks and batches."""


def start(
    device_setting: Literal["auto", "cpu", "cuda"],
    timeout_s: float = TIMEOUT_S,
    settings: Mapping[str, Any] | None = None,
) -> RankInfo:
    """Join the process group that the environment describes, or create one for a single process.

    A rank that waits for the others longer than the timeout takes them to hang. With gloo, which CPUs use, it raises.
    With NCCL, which GPUs use, a thread of torch aborts the process, which then writes no status. On a CPU, torch is
    limited to one thread unless OMP_NUM_THREADS is set.

    Args:
        device_setting: runtime.device.
        timeout_s: longest time that a rank waits for the others, in seconds.
        settings: values by dotted name that must be the same on all ranks, as JSON can represent them.

    Raises:
        ValueError, PeerFailedError: if ranks differ in settings, device type, packages or environment; the first one on
            rank 0, naming the values, the other one on the other ranks.
        RuntimeError: if the environment is incomplete or contradictory, if a GPU is requested and there is none, or if
            a process group already exists.
        ProcessGroupError: if the ranks cannot find each other, for instance because the port is in use.
    """
    if dist.is_initialized():
        raise RuntimeError("a process group already exists; call distributed.stop() before starting another one")
    rank, local_rank, world_size = read_environment()
    device = choose_device(device_setting, local_rank)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    log.info("computing on %s (runtime.device=%s)", name, device_setting)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Launchers leave the variable unset. Each rank would then start a thread for every core, and the ranks would
        # compete for them: a step of 2 ranks on 2 cores takes 470 ms instead of 88 ms.
        torch.set_num_threads(1)
    shared = {**(settings or {}), "the type of the device": device.type}
    _init_process_group(rank, world_size, device, timedelta(seconds=timeout_s), shared)
    return RankInfo(rank=rank, local_rank=local_rank, world_size=world_size, device=device)


def _init_process_group(
    rank: int, world_size: int, device: torch.device, timeout: timedelta, settings: Mapping[str, Any]
) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if world_size == 1:
        # A store inside the process needs no free port, so many single processes can start at the same time.
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=timeout)
        return
    address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    log.info("rank %d of %d joins the process group at %s", rank, world_size, address)
    try:
        # What init_process_group does by default. The ranks compare their settings through the store, because ranks
        # with different timeouts or types of devices could not form the group.
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=timeout))
        store.set_timeout(timeout)
        require_same_settings(PrefixStore("settings", store), rank, world_size, settings)
        # A barrier uses the bound GPU; without one, torch has to guess the device.
        bound_device = device if device.type == "cuda" else None
        dist.init_process_group(
            backend, store=PrefixStore("default_pg", store), rank=rank, world_size=world_size, timeout=timeout,
            device_id=bound_device,
        )  # fmt: skip
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise ProcessGroupError(_describe_join_error(address, str(error))) from error


def _describe_join_error(address: str, error: str) -> str:
    if "EADDRINUSE" in error or "address already in use" in error.lower():
        return (
            f"port {os.environ['MASTER_PORT']} is in use by another process, perhaps another run, or one that was "
            "stopped and whose ranks are still there; end it, or choose another port (torchrun --master-port, "
            "deepspeed --master_port, MASTER_PORT)"
        )
    reason = error.splitlines()[0]
    return f"cannot join the process group at {address}: {reason}; check that rank 0 runs there and is reachable"


def set_collective_timeout(timeout_s: float) -> None:
    """Set the timeout of all process groups, including those that a library has created since `start`, in seconds."""
    internals = dist.distributed_c10d
    # torch 2.11 has this function only under its private name.
    set_timeout = getattr(dist, "set_timeout", None) or internals._set_pg_timeout
    for group in list(internals._world.pg_map):
        set_timeout(timedelta(seconds=timeout_s), group)


def read_environment() -> tuple[int, int, int]:
    """Return rank, local rank and world size; (0, 0, 1) if no launcher has set any of its variables."""
    present = [name for name in LAUNCHER_VARIABLES if name in os.environ]
    if not present:
        return 0, 0, 1
    missing = [name for name in LAUNCHER_VARIABLES if name not in os.environ]
    # Training as a single process would be wrong here: each process of a badly started launch would train its own run.
    if missing:
        raise RuntimeError(
            f"the environment has {', '.join(present)} but not {', '.join(missing)}; start with torchrun, which sets "
            f"all of them, or unset them to run a single process"
        )
    numbers = {name: os.environ[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    if not all(text.isdigit() for text in numbers.values()):
        raise RuntimeError(f"RANK, LOCAL_RANK and WORLD_SIZE must be integers >= 0, got {numbers}; start with torchrun")
    rank, local_rank, world_size = (int(text) for text in numbers.values())
    if not local_rank <= rank < world_size:
        raise RuntimeError(f"LOCAL_RANK <= RANK < WORLD_SIZE must hold, got {numbers}; start with torchrun")
    return rank, local_rank, world_size


def choose_device(setting: str, local_rank: int = 0) -> torch.device:
    """Return the device this process computes on; `auto` chooses a GPU if there is one.

    Raises:
        RuntimeError: if a GPU is required and there is none for this local rank.
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
    """Return the rank information of a single process, without creating a process group.

    Raises:
        RuntimeError: if a GPU is requested and there is none, or if this process is one of several ranks.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise RuntimeError(f"this is one of {dist.get_world_size()} ranks; pass the RankInfo that start() returned")
    return RankInfo(rank=0, local_rank=0, world_size=1, device=choose_device(device_setting))


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def left_unless_failed() -> Iterator[None]:
    """Leave the process group after the `with` block, except when one of several ranks has failed.

    A failed rank must end its process instead, as `iwm_fast.runtime.process.run_and_exit` does.
    """
    try:
        yield
    except BaseException as error:
        # Ranks stop together. But when one fails alone, its peers wait in a collective, and with NCCL leaving the group
        # may wait for them: the reason would not be printed before runtime.rank_timeout_s.
        if isinstance(error, PreemptedError) or dist.get_world_size() == 1:
            stop()
        raise
    stop()


def sum_over_ranks(tensor: Num[Tensor, "*shape"]) -> Num[Tensor, "*shape"]:
    """Return the sum over all ranks, bit-equal on all; without a group, a copy. Collective: every rank must call it."""
    total = tensor.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(total)
    return total


def all_gather(local: Num[Tensor, "size"]) -> Num[Tensor, "total"]:
    """Return the equally long vectors of all ranks, joined in order of rank. Collective: every rank must call it."""
    if not dist.is_initialized():
        return local.detach().clone()
    gathered = local.new_empty(dist.get_world_size() * local.numel())
    dist.all_gather_into_tensor(gathered, local.detach().contiguous())
    return gathered


def copy_from_rank_zero(tensor: Num[Tensor, "*shape"]) -> None:
    """Overwrite a tensor in place with that of rank 0. Collective: every rank must call it."""
    if dist.is_initialized():
        dist.broadcast(tensor.detach(), src=0)


def rank_zero_only(function: Callable[[], Value]) -> Value | None:
    """Call a function on rank 0 and return its value there, None on the other ranks, which wait until it has returned.

    Collective: every rank must call it.

    Raises:
        Exception: on rank 0, whatever the function raised.
        PeerFailedError: on the other ranks, if the function raised.
    """
    if not dist.is_initialized():
        return function()
    value: Value | None = None
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            value = function()
        # Any exception is reported to the other ranks first: they would otherwise wait in the broadcast below until
        # their timeout.
        except Exception as error:
            failure = error
    has_failed = [failure is not None]
    dist.broadcast_object_list(has_failed, src=0)
    if failure is not None:
        raise failure
    if has_failed[0]:
        raise PeerFailedError("rank 0 failed and reports the reason")
    return value


def broadcast_from_rank_zero(function: Callable[[], Value]) -> Value:
    """Call a function on rank 0 only and return its value on every rank. Collective: every rank must call it.

    For decisions that must not differ between ranks, such as those that depend on the contents of a shared disk.

    Raises:
        Exception: on rank 0, whatever the function raised.
        PeerFailedError: on the other ranks, if the function raised.
    """
    if not dist.is_initialized():
        return function()
    values: list[Any] = [rank_zero_only(function)]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def on_every_rank(function: Callable[[], Value]) -> Value:
    """Call a function that is not collective on every rank and return this rank's value, if it succeeded on all ranks.

    Otherwise a rank that succeeded would wait in the next collective for a rank that failed, until the timeout.
    Collective: every rank must call it.

    Raises:
        Exception: on the first rank on which the function raised, whatever it raised there.
        PeerFailedError: on the other ranks, if the function raised on any.
    """
    if not dist.is_initialized():
        return function()
    value: Any = None
    failure: Exception | None = None
    try:
        value = function()
    # Any exception, for the reason above.
    except Exception as error:
        failure = error
    has_failed = gather_objects(failure is not None)
    if not any(has_failed):
        return value
    first = has_failed.index(True)
    if failure is not None and first == dist.get_rank():
        raise failure
    raise PeerFailedError(f"rank {first} failed and reports the reason") from failure


def gather_objects(value: Value) -> list[Value]:
    """Return the values of all ranks in order of rank, pickled on the way, which is too slow for every step.

    Collective: every rank must call it.
    """
    if not dist.is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def claim(name: str) -> bool:
    """Return whether this rank is the first of all ranks to call with this name. Not collective."""
    if not dist.is_initialized():
        return True
    try:
        # torch has no public name for the store that all ranks share.
        return dist.distributed_c10d._get_default_store().add(f"iwm/{name}", 1) == 1
    # The process that holds the store may be gone. A second message is better than none.
    except RuntimeError:
        return True


def any_rank(flags: list[bool], device: torch.device) -> list[bool]:
    """Return, for each flag, whether it is true on at least one rank.

    Collective: every rank must call it, with the same number of flags. No rank returns before all have called, so it
    is also a barrier.
    """
    # Summing would make every step of a single process wait for its device.
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(flags)
    votes = torch.tensor([int(flag) for flag in flags], device=device)
    return [count > 0 for count in sum_over_ranks(votes).tolist()]
