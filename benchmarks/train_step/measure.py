"""Time training steps in interleaved rounds: all engines are built first, then only one of them runs at a time."""

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.harness import device
from benchmarks.harness.device import UnusableGpuError
from benchmarks.harness.session import Case, Session, WrongResultError
from benchmarks.harness.timing import Failure, catching, interleaved_rounds, percentiles
from benchmarks.train_step.engines import Training, Variant, allocated_bytes
from benchmarks.train_step.profile import profile_step
from benchmarks.train_step.workload import StepWorkload
from iwm_fast.monitoring.step_timer import PHASES
from iwm_fast.monitoring.throughput import build_throughput_meter
from iwm_fast.pipelines.batch import Batch
from iwm_fast.runtime.distributed import RankInfo

_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
"""Maximum relative difference of losses by precision; a missing update causes a larger one."""


class StepRound(NamedTuple):
    """Result of one round of one engine."""

    step_s: float
    parts: dict[str, float]
    """Seconds per step for each of PARTS."""
    peak_bytes: int = 0
    """Maximum GPU memory allocated during the round, beyond what was allocated before it."""


def run_round(
    training: Training, batches: Iterator[Batch], steps: int, rank_info: RankInfo, skipped: int = 0
) -> StepRound:
    """Time `steps` steps after `skipped` untimed ones. Collective: all ranks must call it."""
    for _ in range(skipped):
        training.step(batches)
    is_on_gpu = rank_info.device.type == "cuda"
    if is_on_gpu:
        torch.cuda.synchronize(rank_info.device)
        torch.cuda.reset_peak_memory_stats(rank_info.device)
    if rank_info.world_size > 1:
        dist.barrier()
    initial_bytes, begin = allocated_bytes(rank_info.device), time.perf_counter()
    # Only the timers: a report holds predictions and targets, whose memory would count as that of the step.
    timers = [training.step(batches).timer for _ in range(steps)]
    if is_on_gpu:
        torch.cuda.synchronize(rank_info.device)
    step_s = (time.perf_counter() - begin) / steps
    peak = torch.cuda.max_memory_allocated(rank_info.device) - initial_bytes if is_on_gpu else 0
    times_s = [timer.seconds() for timer in timers]
    return StepRound(step_s, {part: statistics.fmean(times[part] for times in times_s) for part in PHASES}, peak)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Result of a comparison, by name of the variant."""

    rounds: dict[str, list[StepRound]] = field(default_factory=dict)
    """Complete rounds of each variant that was warmed up."""
    failures: dict[str, Failure] = field(default_factory=dict)
    """Errors while a variant was built, warmed up or timed; there can be complete rounds before."""
    losses: dict[str, list[float]] = field(default_factory=dict)
    """Losses of the first steps on this rank's share of the batches."""
    resident_bytes: dict[str, int] = field(default_factory=dict)
    """GPU memory that stays allocated between steps."""
    profiles: dict[str, dict[str, float]] = field(default_factory=dict)
    """Milliseconds of a step by group of kernels, if they were profiled."""
    profile_failures: dict[str, Failure] = field(default_factory=dict)
    """Errors while a step was profiled."""


def compare(
    workload: StepWorkload,
    variants: Mapping[str, Variant],
    rank_info: RankInfo,
    *,
    batches: Sequence[Batch] = (),
    deadline: float = math.inf,
    is_profiled: bool = False,
) -> Comparison:
    """Build all variants and time their steps on the same batches, by default the workload's, in interleaved rounds.

    A variant that raises becomes a failure and the others continue, unless the GPU is unusable; then the result is what
    was measured until then. After the deadline, a time on the monotonic clock, no further variant is built and no
    further round starts. Collective: all ranks must call it, and with several of them there can be no deadline.
    """
    batches = batches or workload.batches(rank_info)
    trainings: dict[str, Training] = {}
    # Each variant continues where its last round stopped, so that in any round all variants see the same batches.
    sources = {name: cycle(batches) for name in variants}
    result = Comparison()
    with contextlib.suppress(UnusableGpuError):
        for name, variant in variants.items():
            if trainings and time.monotonic() > deadline:
                break
            with catching(result.failures, name):
                training = Training(variant, workload, rank_info)
                training.warm_up(sources[name], workload.budget.warm_ups)
                trainings[name], result.rounds[name] = training, []
                result.losses[name], result.resident_bytes[name] = training.losses, training.resident_bytes
        # Networks of engines that failed can be part of reference cycles. Free them before memory is measured.
        gc.collect()
        for name in interleaved_rounds(trainings, workload.budget.rounds, lambda _: time.monotonic() <= deadline):
            if name not in result.failures:
                # With several ranks an error ends the run, because the others wait for this rank in a collective.
                with catching(result.failures, name) if rank_info.world_size == 1 else contextlib.nullcontext():
                    step_round = run_round(trainings[name], sources[name], workload.budget.steps, rank_info)
                    result.rounds[name].append(step_round)
        for name, training in trainings.items():
            if is_profiled and name not in result.failures:
                with catching(result.profile_failures, name):
                    result.profiles[name] = profile_step(training, sources[name])
    return result


def check_losses(losses: Mapping[str, Sequence[float]], baseline: str, precision: str) -> None:
    """Raise WrongResultError if the losses of a variant differ from the baseline's by more than rounding.

    If the baseline failed, the first variant that runs takes its place.
    """
    baseline = baseline if baseline in losses else next(iter(losses), baseline)
    for name, actual in losses.items():
        for step, (loss, expected) in enumerate(zip(actual, losses[baseline], strict=True)):
            # The negated comparison is also true for NaN.
            if not abs(loss - expected) <= _TOLERANCE[precision] * abs(expected):
                raise WrongResultError(f"{name}: loss {loss:.6g} in step {step}, {baseline} has {expected:.6g}")


def record(
    session: Session, workload: StepWorkload, case: Case, comparison: Comparison, *, baseline: str, rank_info: RankInfo
) -> None:
    """Record time per step, images per second, parts, memory, losses, profile, and the overhead over the baseline.

    Then raise UnusableGpuError if a failure left the GPU unusable.
    """
    timed = {name: result for name, result in comparison.rounds.items() if result}
    failures = {name: each for name, each in comparison.failures.items() if name not in timed}
    failures |= {f"{name}, profile": each for name, each in comparison.profile_failures.items()}
    for name, failure in failures.items():
        session.record(case, name, failure=failure.message)
    throughput_meter = build_throughput_meter(workload.config(), rank_info)
    for name, result in timed.items():
        times = percentiles([1e3 * step_round.step_s for step_round in result])
        images_per_s = 1e3 * workload.batch_size / times["median_ms"]
        figures: dict[str, Any] = {"images_per_s": round(images_per_s, 2), **part_figures(result)}
        if baseline in timed and baseline != name:
            figures |= {"over": baseline, "over_percent": round(overhead_percent(result, timed[baseline]), 2)}
        mfu = throughput_meter.mfu(images_per_s)
        if mfu is not None:
            figures |= {"mfu_percent": round(100 * mfu, 2), "peak": str(throughput_meter)}
        if rank_info.device.type == "cuda":
            peak = comparison.resident_bytes.get(name, 0) + max(step_round.peak_bytes for step_round in result)
            figures["memory_gb"] = round(peak / 1e9, 2)
        figures |= {"losses": comparison.losses[name]} if name in comparison.losses else {}
        figures |= {"profile_ms": comparison.profiles[name]} if name in comparison.profiles else {}
        failure = comparison.failures.get(name)
        session.record(case, name, **times, figures=figures, failure=failure and failure.message)
    if comparison.failures or comparison.profile_failures:
        device.check_usable()


def part_figures(rounds: Sequence[StepRound]) -> dict[str, float]:
    """Return medians over rounds: milliseconds of each part, and the shares of the step that have goals."""
    figures = {}
    for part in PHASES:
        figures[f"{part}_ms"] = round(1e3 * statistics.median(step_round.parts[part] for step_round in rounds), 3)
    for part in ("wait", "teacher_update"):
        share = statistics.median(step_round.parts[part] / step_round.step_s for step_round in rounds)
        figures[f"{part}_percent"] = round(100 * share, 3)
    return figures


def overhead_percent(rounds: Sequence[StepRound], baseline: Sequence[StepRound]) -> float:
    """Return by how many percent a step is longer than the baseline's.

    It is the median of ratios within a round, because the speed of the machine drifts between rounds.
    """
    ratios = (ours.step_s / theirs.step_s for ours, theirs in zip(rounds, baseline, strict=False))
    return 100 * (statistics.median(ratios) - 1)
