"""What a finished run tells on the console: where its files are, what limited its speed, and what to do next."""

import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.step_timer import PHASES

# Above these shares of the time, waiting for data or work between steps is worth a change of settings.
_WAIT_LIMIT, _OTHER_LIMIT = 0.05, 0.1

LimitingPart = Literal["reading", "decoding", "loading", "between steps", "computation"]
"""What can limit the speed of a run."""


def summarize_run(config: RunConfig, rows: list[dict[str, Any]], checkpoint: Path | None) -> str:
    """Return a few lines about a finished run.

    Args:
        config: settings of the run.
        rows: log rows of the run, as `read_metrics` returns them.
        checkpoint: folder of the newest checkpoint.
    """
    folder = shlex.quote(config.output.folder)
    shards = "" if config.data.val else " data.val=SHARDS"
    lines = [
        f"finished at step {rows[-1]['step']:,}" if rows else "finished",
        f"  run folder  {config.output.folder}",
        f"  checkpoint  {checkpoint}",
        *_describe_best(config, rows),
        f"  report      iwm report run={folder}",
    ]
    # Rows of earlier versions lack the times of the phases.
    timed = [row for row in rows if row.get("time/other_s") is not None]
    # The first row has no share in the times, because filling caches slows down its steps.
    if len(timed) > 1:
        lines += _describe_time(config, timed)
    evaluations = [f"iwm evaluate mrr run={folder}{shards}", f"iwm imagine run={folder}{shards}"]
    # The identity predictor applies no transformation, so only its encoder can be measured.
    if config.model.predictor.depth == 0:
        evaluations = [f"iwm evaluate knn run={folder}{shards}"]
    return "\n".join(
        [*lines, "next", *(f"  {command}" for command in (*evaluations, f"iwm export run={folder} to=DIR"))]
    )


def _describe_best(config: RunConfig, rows: list[dict[str, Any]]) -> list[str]:
    metric, step = config.output.keep_best, rows[-1].get("eval/best_step") if rows else None
    values = [row[f"eval/{metric}"] for row in rows if row["step"] == step]
    # A disk may have damaged the row of the best step.
    return [f"  best        checkpoint=best is step {step:,.0f}, {metric} {values[0]:.4g}"] if step and values else []


def time_shares(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Return the share of the time after the first row that each phase of a step took, and `other` between steps."""
    # Rows hold means per step, and may cover different numbers of steps.
    counted = [(row, row["step"] - earlier["step"]) for earlier, row in pairwise(rows)]
    total_s = sum(row["speed/step_s"] * count for row, count in counted)
    return {
        phase: sum(row[f"time/{phase}_s"] * count for row, count in counted) / total_s for phase in (*PHASES, "other")
    }


def _describe_time(config: RunConfig, rows: list[dict[str, Any]]) -> list[str]:
    shares = time_shares(rows)
    computing = {
        "forward": shares["forward"] + shares["teacher"],
        "backward": shares["backward"],
        "optimiser": shares["optimizer"] + shares["teacher_update"],
    }
    parts = {"waiting for data": shares["wait"], **computing, "between steps": shares["other"]}
    text = ", ".join(f"{name} {100 * share:.0f} %" for name, share in parts.items())
    is_on_gpu = config.runtime.device != "cpu" and torch.cuda.is_available()
    limit = describe_limit(config, _find_limit(shares), is_on_gpu=is_on_gpu)
    return [f"  time        {text}", f"  limit       {limit}"]


def _find_limit(shares: dict[str, float]) -> LimitingPart:
    """Return what most of a run's avoidable time went to, or computation if that is where it should go."""
    if shares["wait"] >= max(_WAIT_LIMIT, shares["other"]):
        return "loading"
    return "between steps" if shares["other"] >= _OTHER_LIMIT else "computation"


def describe_limit(config: RunConfig, part: LimitingPart, *, is_on_gpu: bool) -> str:
    """Return what limits the speed of a run, and the setting to change.

    Args:
        config: settings of the run.
        part: what limits it; "loading" is reading or decoding, where it is not known which.
        is_on_gpu: whether the run computes on a GPU.
    """
    runtime, output = config.runtime, config.output
    more_readers = f"runtime.reader_threads (now {runtime.reader_threads}) if storage is slow"
    more_decoders = f"runtime.loader_threads (now {runtime.loader_threads}) if cores are idle"
    if part == "reading":
        return f"reading: raise {more_readers}"
    if part in ("decoding", "loading"):
        name = "decoding" if part == "decoding" else "loading data"
        if runtime.loader == "torch":
            return f"{name}: set runtime.loader=dali"
        return f"{name}: raise {more_decoders}" + (f", {more_readers}" if part == "loading" else "")
    if part == "between steps":
        evaluations = f" or output.evaluate_every (now {output.evaluate_every})" if output.evaluate_every else ""
        return (
            f"log rows, checkpoints and evaluations between steps: raise output.checkpoint_every "
            f"(now {output.checkpoint_every}){evaluations}"
        )
    if not is_on_gpu:
        return "computation on the CPU, as it should be"
    remedy = "set runtime.ops=auto" if runtime.ops == "reference" else "set runtime.compile=true"
    is_tuned = runtime.ops != "reference" and (runtime.compile or runtime.zero_stage == 3)
    return "computation on the GPU, as it should be" + ("" if is_tuned else f"; to speed it up, {remedy}")
