"""Where a step's time goes: the device's kernels by group, and the gaps between them."""

import re
from collections.abc import Iterator

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.train_step.engines import Training
from iwm_fast.pipelines.batch import Batch

GROUPS = {
    "attention": r"attention|attn|flash|fmha|sdpa|softmax",
    # Inductor names a kernel also after the product whose result it reads. The products it writes are templates.
    "products": r"^(?!triton_(?!tem)).*(gemm|nvjet|cutlass|cublas|splitk|xmma|addmm|::b?mm|::linear|conv(olution|2d))",
    # Before the norms, because clipping takes the norm of the gradients.
    "optimizer": r"multi_tensor|adam|foreach|lerp|lpnorm",
    "norm": r"norm|gammabeta",
    "GELU": r"gelu",
    "copies": r"copy|memcpy|memset|fill|zero_|cat|index|gather|scatter|_combine_kernel|group_sum|aten::to",
    "sums": r"reduce|sum",
}
"""Patterns of kernel names (on a CPU of operators), in the order in which they are tried."""
OTHER, GAPS = "other", "gaps"


def profile_step(training: Training, batches: Iterator[Batch]) -> dict[str, float]:
    """Return the milliseconds of one step by group; gaps are the time in which the device computes nothing."""
    has_gpu = torch.cuda.is_available()
    training.step(batches)
    with profile(activities=[ProfilerActivity.CUDA if has_gpu else ProfilerActivity.CPU]) as profiler:
        training.step(batches)
        if has_gpu:
            torch.cuda.synchronize()
    events = [event for event in profiler.events() or [] if _is_leaf(event, has_gpu)]
    return group_times([(event.name, event.time_range.start, event.time_range.end) for event in events])


def _is_leaf(event: object, has_gpu: bool) -> bool:
    if has_gpu:
        is_range = getattr(event, "is_user_annotation", False)
        return not is_range and event.device_type == torch.autograd.DeviceType.CUDA  # pyright: ignore
    return event.name.startswith("aten::") and not (event.cpu_parent and event.cpu_parent.name.startswith("aten::"))  # pyright: ignore


def group_times(intervals: list[tuple[str, float, float]]) -> dict[str, float]:
    """Return milliseconds by group for kernels of these names, starts and ends in microseconds."""
    times: dict[str, float] = dict.fromkeys([*GROUPS, OTHER, GAPS], 0.0)
    busy_until = min((start for _, start, _ in intervals), default=0.0)
    for name, start, end in sorted(intervals, key=lambda interval: interval[1]):
        times[group_of(name)] += end - start
        times[GAPS] += max(start - busy_until, 0.0)
        busy_until = max(busy_until, end)
    return {name: round(1e-3 * us, 3) for name, us in times.items()}


def group_of(kernel: str) -> str:
    """Return the group of a kernel's name."""
    return next((name for name, pattern in GROUPS.items() if re.search(pattern, kernel, re.IGNORECASE)), OTHER)
