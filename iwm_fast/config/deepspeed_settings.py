"""Which of DeepSpeed's settings `runtime.deepspeed` may contain: those that change memory, speed or logs only.

Every other one is refused. Many change what is learned, such as the types of gradients and of messages between ranks,
and DeepSpeed ignores misspelt names at the top level.
"""

import difflib
from typing import Any

from iwm_fast.config.values import convert
from iwm_fast.pipelines.config import require

SIZES = {
    "zero_optimization.reduce_bucket_size": 1,
    "zero_optimization.allgather_bucket_size": 1,
    "zero_optimization.stage3_prefetch_bucket_size": 0,
    "zero_optimization.stage3_param_persistence_threshold": 0,
    "zero_optimization.stage3_max_live_parameters": 0,
    "zero_optimization.stage3_max_reuse_distance": 0,
}
"""Numbers of elements by name, with the smallest accepted one."""

SWITCHES = (
    "zero_optimization.overlap_comm",
    "zero_optimization.contiguous_gradients",
    "timers.throughput.enabled",
    "timers.throughput.synchronized",
    "comms_logger.enabled",
    "comms_logger.verbose",
    "comms_logger.prof_all",
    "comms_logger.debug",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
)
"""Settings that are true or false."""

# They follow from other settings of the run; the engine refuses other values and says which settings to use.
_DERIVED = (
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_allreduce_op",
    "gradient_clipping", "zero_optimization.stage", "zero_optimization.compute_grad_norm",
    "zero_optimization.offload_optimizer", "zero_optimization.round_robin_gradients", "managed_gradient_accumulation",
    "bf16.enabled", "fp16.enabled", "torch_autocast.enabled", "steps_per_print", "optimizer", "scheduler",
)  # fmt: skip


def check_deepspeed_settings(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Return the nested settings of `runtime.deepspeed` with values of the right types.

    Raises:
        ValueError: if a setting is not among the accepted ones, or has a value of another type or out of range.
    """
    checked = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in _DERIVED:
            checked[key] = value
        elif name in SWITCHES:
            checked[key] = convert(f"runtime.deepspeed.{name}", bool, value)
        elif name in SIZES:
            checked[key] = convert(f"runtime.deepspeed.{name}", int, value)
            require(checked[key] >= SIZES[name], f"runtime.deepspeed.{name}", value, f"be at least {SIZES[name]}")
        elif any(accepted.startswith(f"{name}.") for accepted in (*SIZES, *SWITCHES, *_DERIVED)):
            require(isinstance(value, dict), f"runtime.deepspeed.{name}", value, "be unset or a mapping of settings")
            checked[key] = check_deepspeed_settings(value, f"{name}.")
        else:
            _refuse(name)
    return checked


def _refuse(name: str) -> None:
    accepted = (*SIZES, *SWITCHES)
    # The last word is what people remember.
    by_leaf = [other for other in accepted if other.endswith(f".{name.rpartition('.')[2]}")]
    matches = by_leaf or difflib.get_close_matches(name, accepted, n=1, cutoff=0.7)
    hint = f" (did you mean runtime.deepspeed.{matches[0]}?)" if matches else ""
    raise ValueError(
        f"runtime.deepspeed.{name} must be unset{hint}; only settings of memory, speed and logs are accepted: "
        f"{', '.join(accepted)}"
    )
