"""Tune the static tables of attention: time candidates beside the shipped launches.

A candidate is a launch of another `LaunchConfig`. All candidates are compiled first, on all cores. One that spills,
does not fit or computes a wrong result is not timed.
"""

import itertools
import os
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks.harness import device, timing
from benchmarks.harness.masks import GRID, masked_batch
from benchmarks.harness.records import BACKWARD, FORWARD
from benchmarks.harness.session import ROUNDING_ERROR, Case, Session, relative_error
from benchmarks.kernels.attention import HEAD_DIMS, IMAGES, NUM_HEADS, make_provider
from iwm_fast.kernels.attention import kernels
from iwm_fast.kernels.attention.kernels import LaunchConfig, backward_launches, build_launches, forward_launches
from iwm_fast.kernels.attention.sequences import Sequences
from iwm_fast.kernels.launch import IS_INTERPRETING, Launch, architecture, as_constexpr
from iwm_fast.kernels.launch import upcast_for_interpreter as upcast

SHIPPED = "shipped"
SWEEP = "attention sweep"


def run(session: Session) -> None:
    """Time all candidates for the teacher's and the predictor's length, the median context, and a grid of 16 x 16."""
    context, _ = masked_batch(IMAGES)
    lengths = (GRID**2, int(statistics.median(context.lengths)), 256)
    for length, head_dim, pass_ in itertools.product(lengths, HEAD_DIMS[::-1], (BACKWARD, FORWARD)):
        case = Case(SWEEP, {"N": length, "d": head_dim, "H": NUM_HEADS, "B": IMAGES})
        if not is_swept(session, case, pass_) and session.has_time(f"{case} {pass_}"):
            sweep(session, case, pass_, candidate_configs(length))


def is_swept(session: Session, case: Case, pass_: str) -> bool:
    """Return whether a pass is recorded: the shipped launches' record is the last of those that are written."""
    return any(each.group == case.group(pass_) and each.provider == SHIPPED for each in session.records)


def sweep(session: Session, case: Case, pass_: str, configs: Sequence[LaunchConfig]) -> None:
    """Time candidates for sequences of equal length beside the shipped launches, all on the same tensors."""
    length, head_dim, num_heads, images = (int(case.shape[name]) for name in ("N", "d", "H", "B"))
    sequences, kind = Sequences.of_equal_length(length), (num_heads, head_dim, case.dtype)
    _, _, (qkv,), (d_out,) = make_provider(sequences, length * images, kind, session.device)
    qkv, d_out = upcast(qkv.detach()), upcast(d_out)
    out, lse = torch.empty_like(d_out), torch.empty(num_heads, len(qkv), device=session.device)
    arch, d_qkv = architecture(qkv.device), torch.empty_like(qkv)
    forward = forward_launches(arch, qkv, sequences, out, lse)
    # The backward pass reads what the forward pass writes.
    for launch in forward:
        launch.run()
    if pass_ == FORWARD:
        target, shipped, kernel = out, forward, kernels._attention_forward
        tensors = {"out_ptr": out, "lse_ptr": lse}
    else:
        target, shipped = d_qkv, backward_launches(arch, qkv, sequences, d_out, d_qkv, lse)
        kernel, tensors = kernels._attention_backward, {"d_out_ptr": d_out, "d_qkv_ptr": d_qkv, "lse_ptr": lse}
    candidates = {name_of(config): build_launches(kernel, (config,), qkv, sequences, tensors)[0] for config in configs}
    time_launches(session, case, pass_, candidates, shipped, target=target)


def candidate_configs(length: int) -> list[LaunchConfig]:
    """Return configs for sequences up to a length: all combinations of key splits, queries per tile, warps, stages."""
    splits = {power_of_two_tiles(length, 16), power_of_two_tiles(length, 64), (64,) * triton.cdiv(length, 64)}
    splits |= {split for split in ((128,), (256,), (128, 128)) if sum(split) - split[-1] < length <= sum(split)}
    grid = itertools.product(sorted(splits), (16, 32, 64), (4, 8), (1, 2, 3))
    return [LaunchConfig((split,), *rest) for split, *rest in grid]


def power_of_two_tiles(length: int, min_tile: int) -> tuple[int, ...]:
    """Return at most three powers of two, largest first, that cover a length; the last may extend beyond it."""
    tiles: list[int] = []
    while (remaining := length - sum(tiles)) > 0:
        tile = 1 << (remaining.bit_length() - 1)
        must_cover = len(tiles) == 2 and tile < remaining
        tiles.append(max(2 * tile if must_cover else tile, min_tile))
    return tuple(tiles)


def name_of(config: LaunchConfig) -> str:
    """Return the name of a config in the tables."""
    split = "+".join(map(str, config.key_splits[-1]))
    return f"{split} q{config.num_queries} w{config.num_warps} s{config.num_stages}"


def time_launches(
    session: Session, case: Case, pass_: str, candidates: dict[str, Launch], shipped: list[Launch], *, target: Tensor
) -> None:
    """Time candidates beside the shipped launches; all write into `target`.

    Times and failures are recorded together at the end, so that a pass that was cut off is swept again, without the
    candidates that made the GPU unusable. Nothing is recorded after the session's time limit.
    """
    failed = [record.provider for record in session.records if record.group == case.group(pass_)]
    candidates = {name: launch for name, launch in candidates.items() if name not in failed}
    compile_all([*candidates.values(), *shipped])
    expected = _run(shipped, target)
    functions: dict[str, timing.TimedFunction] = {}
    failures: dict[str, timing.Timing | timing.Failure] = {}
    for name, launch in candidates.items():
        if not session.has_time(f"{case} {pass_}: {name}"):
            return
        failure = why_not_timed(launch, target, expected, ROUNDING_ERROR[case.dtype])
        if failure:
            failures[name] = timing.Failure(failure)
            if not device.is_usable():
                # Records the failures and raises.
                session.record_timings(case, pass_, failures)
        else:
            functions[name] = timing.TimedFunction(lambda _, launch=launch: launch.run())
    # Last, because its record completes the pass.
    functions[SHIPPED] = timing.TimedFunction(lambda _: [launch.run() for launch in shipped])
    session.record_timings(case, pass_, failures | timing.compare(functions, budget=session.budget))


def why_not_timed(launch: Launch, target: Tensor, expected: Tensor, tolerance: float) -> str:
    """Return why a candidate is not timed: it raises, spills or computes something else; empty if it may be timed."""
    try:
        if spills(launch):
            return "spills"
        # A comparison with NaN is false.
        is_right = relative_error(_run([launch], target), expected) <= tolerance
        return "" if is_right else "differs from the shipped launches"
    except Exception as error:
        return timing.first_line(error)


def _run(launches: Sequence[Launch], target: Tensor) -> Tensor:
    target.fill_(float("nan"))
    for launch in launches:
        launch.run()
    return target.clone()


def compile_all(launches: Sequence[Launch]) -> None:
    """Compile launches on all cores; one that does not compile raises later, when it runs."""
    if IS_INTERPRETING:
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for launch in launches:
            compile_launch(launch)


def compile_launch(launch: Launch) -> Any:
    """Return the compiled kernel of a launch without running it."""
    return launch.kernel.warmup(
        **launch.arguments, **as_constexpr(launch.constants), **launch.options, grid=launch.grid
    )


def spills(launch: Launch) -> bool:
    """Return whether the compiled kernel spills registers; loads the kernel."""
    if IS_INTERPRETING:
        return False
    kernel = compile_launch(launch)
    # Triton sets n_spills only when it loads the kernel onto the device.
    kernel._init_handles()
    return kernel.n_spills > 0
