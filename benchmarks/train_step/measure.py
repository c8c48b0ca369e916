"""Time training steps in turns: all that are compared are built first, then step round after round, one at a time."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.harness.session import Case, Session, WrongResultError
from benchmarks.harness.timing import Failure, first_line, in_turns, spread
from benchmarks.train_step.engines import Contestants, Training, allocated
from benchmarks.train_step.workload import StepWorkload
from iwm_fast.monitoring.step_timer import PARTS
from iwm_fast.monitoring.throughput import build_throughput_meter
from iwm_fast.pipelines.batch import Batch
from iwm_fast.runtime.distributed import RankInfo

_TOLERANCE = {"fp32": 1e-3, "bf16": 3e-2}
"""Largest relative difference of losses; a missing update shows as more."""


class StepTurn(NamedTuple):
    """What one turn took."""

    step_s: float
    parts: dict[str, float]
    """Seconds per step of each of PARTS."""
    peak_bytes: int = 0
    """Most that was in use beyond what there was before, on a GPU."""


def take_turn(
    training: Training, batches: Iterator[Batch], steps: int, rank_info: RankInfo, left_out: int = 0
) -> StepTurn:
    """Run some steps, of which the first ones do not count."""
    for _ in range(left_out):
        training.step(batches)
    is_on_gpu = rank_info.device.type == "cuda"
    if is_on_gpu:
        torch.cuda.synchronize(rank_info.device)
        torch.cuda.reset_peak_memory_stats(rank_info.device)
    if rank_info.world_size > 1:
        dist.barrier()
    before, began = allocated(rank_info.device), time.perf_counter()
    reports = [training.step(batches) for _ in range(steps)]
    if is_on_gpu:
        torch.cuda.synchronize(rank_info.device)
    step_s = (time.perf_counter() - began) / steps
    peak = torch.cuda.max_memory_allocated(rank_info.device) - before if is_on_gpu else 0
    taken = [report.timer.seconds() for report in reports]
    return StepTurn(step_s, {part: statistics.fmean(row[part] for row in taken) for part in PARTS}, peak)


class Comparison(NamedTuple):
    """What a comparison gave."""

    turns: dict[str, list[StepTurn] | Failure]
    losses: dict[str, list[float]]
    """Of the first steps, this rank's share."""
    kept_bytes: dict[str, int]


def compare(
    workload: StepWorkload, contestants: Contestants, rank_info: RankInfo, *, deadline: float = math.inf
) -> Comparison:
    """Build all, then give each its turns with one cached batch; one that raises is a failure and the others go on.

    No further round is started after the deadline on the monotonic clock.
    """
    batches = repeat(workload.cached_batch(rank_info))
    losses, trainings, failures = {}, {}, {}
    for name, runtime in contestants.items():
        try:
            training = Training(runtime, workload, rank_info)
            losses[name] = training.warm_up(batches, workload.turns.warm_ups)
            trainings[name] = training
        except Exception as error:
            failures[name] = Failure(first_line(error))
    taken: dict[str, list[StepTurn]] = {name: [] for name in trainings}
    gc.collect()
    for name in in_turns(trainings, workload.turns.rounds, lambda _: time.monotonic() <= deadline):
        taken[name].append(take_turn(trainings[name], batches, workload.turns.steps, rank_info))
    kept = {name: training.kept_bytes for name, training in trainings.items()}
    return Comparison(failures | taken, losses, kept)


def check_losses(losses: Mapping[str, Sequence[float]], base: str, precision: str) -> None:
    """Check that all that run train alike; if the base does not run, like the first that does.

    Raises:
        WrongResultError: if losses of the first steps differ by more than rounding.
    """
    base = base if base in losses else next(iter(losses), base)
    for name, found in losses.items():
        for step, (loss, wanted) in enumerate(zip(found, losses[base], strict=True)):
            # written so that NaN fails
            if not abs(loss - wanted) <= _TOLERANCE[precision] * abs(wanted):
                raise WrongResultError(f"{name}: loss {loss:.6g} in step {step} where {base} has {wanted:.6g}")


def note(
    session: Session,
    workload: StepWorkload,
    case: Case,
    found: Comparison,
    *,
    base_of: Callable[[str], str],
    rank_info: RankInfo,
) -> None:
    """Write a record for each contestant: ms per step, images/s, parts, and what it takes beyond another, its base."""
    yardstick = build_throughput_meter(workload.config(), rank_info)
    for name, result in found.turns.items():
        if isinstance(result, Failure):
            session.note(case, name, failure=result.line)
            continue
        times = spread([1e3 * turn.step_s for turn in result])
        images_per_s = 1e3 * workload.batch_size / times["median_ms"]
        figures: dict[str, Any] = {"images_per_s": round(images_per_s, 2), **part_figures(result)}
        over = base_of(name)
        base = found.turns.get(over)
        if isinstance(base, list) and over != name:
            figures |= {"over": over, "over_percent": round(over_percent(result, base), 2)}
        share = yardstick.mfu(images_per_s)
        if share is not None:
            figures |= {"mfu_percent": round(100 * share, 2), "peak": str(yardstick)}
        if rank_info.device.type == "cuda":
            peak = found.kept_bytes.get(name, 0) + max(turn.peak_bytes for turn in result)
            figures["memory_gb"] = round(peak / 1e9, 2)
        session.note(case, name, **times, figures=figures)


def part_figures(taken: Sequence[StepTurn]) -> dict[str, float]:
    """Return medians over turns: milliseconds of each part, and the shares of the step that have goals."""
    found = {f"{part}_ms": round(1e3 * statistics.median(turn.parts[part] for turn in taken), 3) for part in PARTS}
    for part in ("wait", "teacher_update"):
        share = statistics.median(turn.parts[part] / turn.step_s for turn in taken)
        found[f"{part}_percent"] = round(100 * share, 3)
    return found


def over_percent(taken: Sequence[StepTurn], base: Sequence[StepTurn]) -> float:
    """Return by how many percent a step is longer than the base's, the median over rounds: a round is one weather."""
    rounds = zip(taken, base, strict=False)
    return 100 * (statistics.median(one.step_s / other.step_s for one, other in rounds) - 1)
