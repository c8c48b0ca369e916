"""Exhausted memory as one message for the user: where, how much there is, and which settings need less."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from iwm_fast.config.batch_size import accumulation_steps
from iwm_fast.config.run import RunConfig
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.error_reporting import PeerFailedError
from iwm_fast.runtime.memory_errors import exhausted_memory


class TrainingMemoryError(RuntimeError):
    """Memory was exhausted in training; the message names the settings that need less."""


@contextmanager
def memory_errors_explained(config: RunConfig, rank_info: RankInfo, doing: Callable[[], str]) -> Iterator[None]:
    """Turn a library's error about exhausted memory into a message for the user; let other errors pass.

    Args:
        config: settings of the run.
        rank_info: this process.
        doing: called after an error; returns what the process was doing.

    Raises:
        TrainingMemoryError: on the first rank whose memory is exhausted.
        PeerFailedError: on the others, so that only one message is printed.
    """
    try:
        yield
    except Exception as error:
        exhausted = None if isinstance(error, TrainingMemoryError) else exhausted_memory(error)
        if exhausted is None:
            raise
        if not distributed.claim("message about memory"):
            raise PeerFailedError("another rank reports that memory is exhausted") from error
        kind, text = exhausted
        advice = _gpu_advice(config, rank_info) if kind == "GPU" else _host_advice(config)
        resume = "resume with resume=auto" if config.resume == "never" else "start again"
        raise TrainingMemoryError(
            f"out of {kind} memory in {doing()} ({text}); {advice}, then {resume}; earlier checkpoints are kept"
        ) from error


def _gpu_advice(config: RunConfig, rank_info: RankInfo) -> str:
    size, _ = accumulation_steps(config, rank_info.world_size)
    share = config.optim.global_batch_size // rank_info.world_size
    smaller = max((divisor for divisor in range(1, size) if share % divisor == 0), default=None)
    settings = [f"runtime.micro_batch_size={smaller}"] if smaller else []
    if smaller and any(config.objective.vicreg_weights(is_identity=config.model.predictor.depth == 0)):
        settings[0] += " (in a new run, because VICReg's terms depend on it)"
    runtime = config.runtime
    if not runtime.activation_checkpointing:
        settings.append("runtime.activation_checkpointing=true")
    stage = 1 if runtime.zero_stage is None else runtime.zero_stage
    # torch.compile excludes stage 3.
    if rank_info.world_size > 1 and runtime.engine == "deepspeed" and stage < (2 if runtime.compile else 3):
        settings.append(f"runtime.zero_stage={stage + 1}")
    elif rank_info.world_size > 1 and runtime.engine == "plain":
        settings.append("runtime.engine=deepspeed")
    advice = f"set {' or '.join(settings)}" if settings else "use a larger GPU or more ranks"
    return f"{_describe_gpu(rank_info.device)}runtime.micro_batch_size is {size}: {advice}"


def _describe_gpu(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    reserved = torch.cuda.memory_reserved(device)
    gib = 2**30
    return (
        f"GPU {device.index} has {total / gib:.1f} GiB, of which torch holds {reserved / gib:.1f} and "
        f"{free / gib:.1f} are free; "
    )


def _host_advice(config: RunConfig) -> str:
    runtime = config.runtime
    return (
        f"lower runtime.prefetch (now {runtime.prefetch}), runtime.read_ahead (now {runtime.read_ahead}) or the number "
        "of ranks per machine"
    )
