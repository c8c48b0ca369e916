"""`iwm check`: what a run will take and whether it can start, told in seconds and without training.

Nothing is written, and nothing is built: the networks are counted on torch's meta device.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.checkpoints.pretrained import read_source
from iwm_fast.config.commands import CheckConfig
from iwm_fast.config.fingerprint import fingerprint
from iwm_fast.config.run import RunConfig, accumulation_steps
from iwm_fast.engines.deepspeed_engine import deepspeed_config
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.student import Student, build_student, choose_ops
from iwm_fast.monitoring.flops import PatchCounts, patch_counts, peak_of, training_flops
from iwm_fast.monitoring.memory_estimate import STAGES, estimate_memory
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.runtime.distributed import choose_device
from iwm_fast.training.loaders import open_training_shards
from iwm_fast.training.resume import stream_start
from iwm_fast.training.schedules import total_steps

# of the GPU's peak, what a well-fed run of this kind reaches
_USUAL_SHARE = 0.4
_MOST_SHOWN = 20
_GIB = 2**30

Value = TypeVar("Value")


@dataclass
class Report:
    """What was found out."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    """Name and text."""
    problems: list[str] = field(default_factory=list)
    """What would stop the run, one message each."""

    def add(self, name: str, text: str) -> None:
        """Add a row."""
        self.rows.append((name, text))

    def attempt(self, name: str, find: Callable[[], Value]) -> Value | None:
        """Return what is found; if our code refuses, keep the message as a problem and return None."""
        try:
            return find()
        except (ValueError, RuntimeError, OSError, ShardError, CheckpointError) as error:
            self.problems.append("\n".join([str(error), *getattr(error, "__notes__", ())]))
            self.add(name, "would stop the run, see below")
            return None


def check_run(config: RunConfig, asked: CheckConfig) -> None:
    """Print the report.

    Raises:
        ValueError: after the report, if something would stop the run, naming all of it.
    """
    report, memory = examine(config, asked)
    console = Console()
    table = Table("what", "this run", title=f"{config.output.folder} on {_ranks(_num_ranks(asked))}")
    for row in report.rows:
        table.add_row(*row)
    console.print(table)
    if memory is not None:
        console.print(memory)
    if report.problems:
        raise ValueError("this run would be stopped:\n" + "\n".join(f"- {problem}" for problem in report.problems))


def examine(config: RunConfig, asked: CheckConfig) -> tuple[Report, Table | None]:
    """Return the report and the table of memory; without masks or a batch there is none."""
    report, ranks = Report(), _num_ranks(asked)
    shards = report.attempt("training samples", lambda: open_training_shards(config.data))
    if shards is not None:
        report.add("training samples", _describe_shards(shards))
    if config.data.val:
        val = report.attempt("validation samples", lambda: open_shards(config.data.val))
        if val is not None:
            report.add("validation samples", _describe_shards(val))
    elif config.output.evaluate_every:
        report.problems.append("data.val must name validation shards where output.evaluate_every is set, got ''")
    batch = report.attempt("batch", lambda: accumulation_steps(config, ranks))
    if batch is not None:
        text = f"{_ranks(ranks)} x {batch[0]} images x {batch[1]} micro-batch{'es' if batch[1] > 1 else ''}"
        report.add("global batch", f"{config.optim.global_batch_size:,} = {text}")
    if shards is not None:
        _report_progress(report, config, shards)
    student = _report_networks(report, config)
    if not asked.gpu:
        report.attempt("runtime", lambda: choose_ops(config, choose_device(config.runtime.device)))
    if batch is not None and config.runtime.engine == "deepspeed":
        report.attempt("runtime.deepspeed", lambda: deepspeed_config(config, ranks))
    counts = report.attempt("masks", lambda: patch_counts(config))
    if counts is not None:
        _report_work(report, config, counts)
        if shards is not None:
            report.attempt("time", lambda: report.add("time", _time(config, asked, shards.num_samples)))
    if counts is None or batch is None:
        return report, None
    return report, memory_table(config, counts, student, ranks, micro_batch_size=batch[0])


def _num_ranks(asked: CheckConfig) -> int:
    if asked.ranks is not None:
        return asked.ranks
    launched = os.environ.get("WORLD_SIZE", "")
    return int(launched) if launched.isdigit() else torch.cuda.device_count() or 1


def _ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _describe_shards(shards: ShardSet) -> str:
    labelled = float(np.mean(shards.labels(np.arange(shards.num_samples)) >= 0))
    return f"{shards.num_samples:,} in {len(shards.shards):,} shards, {100 * labelled:.1f} % with a label"


def _report_progress(report: Report, config: RunConfig, shards: ShardSet) -> None:
    """Say how many steps there are and whether they begin at 0."""
    per_epoch = shards.num_samples / config.optim.global_batch_size
    steps = total_steps(config.optim, shards.num_samples)
    report.add("steps", f"{per_epoch:,.1f} per epoch, {steps:,} in {config.optim.epochs:g} epochs")
    report.attempt("run folder", lambda: _report_folder(report, config, shards))


def _report_folder(report: Report, config: RunConfig, shards: ShardSet) -> None:
    folder = Path(config.output.folder)
    saved, refused = checkpoints.read_newest(folder)
    is_used = saved is not None or (folder / "metrics.jsonl").exists()
    for path in refused:
        report.add("damaged", f"{path.name}: an older checkpoint is taken")
    current = fingerprint(config, shards.content_digest)
    if saved is not None:
        report.add("run folder", f"holds a run at step {saved.step:,}")
        names = sorted(saved.fingerprint.keys() | current.keys())
        changed = [name for name in names if saved.fingerprint.get(name) != current.get(name)]
        rows = [f"{name}: {saved.fingerprint.get(name)} -> {current.get(name)}" for name in changed[:_MOST_SHOWN]]
        report.add("differs from it", "\n".join(rows) or "nothing that decides the result")
    if is_used and config.resume == "never":
        raise ValueError(
            f"output.folder = {config.output.folder!r} already holds a run; "
            "name another folder, or say resume=auto to go on with it"
        )
    if saved is None:
        report.add("run folder", "holds no checkpoint: the run starts anew")
        return
    start = stream_start(saved, config, current, shards.num_samples)
    last = total_steps(config.optim, shards.num_samples, start)
    report.add("goes on", f"{last - saved.step:,} steps to step {last:,}" if saved.step < last else "it is finished")


def _report_networks(report: Report, config: RunConfig) -> Student:
    """Count parameters, and look at what they would start with."""
    with torch.device("meta"):
        student = build_student(config, REFERENCE)
    for name, part in (("encoder", student.encoder), ("predictor", student.predictor)):
        sizes = [parameter.numel() for parameter in part.parameters()]
        report.add(f"{name} parameters", f"{sum(sizes) / 1e6:.2f} M in {len(sizes)} tensors")
    # a run that goes on has its weights from its own checkpoint
    if config.init_from and checkpoints.newest(Path(config.output.folder)) is None:
        source = report.attempt("init_from", lambda: read_source(config, student))
        if source is not None:
            report.add("init_from", "\n".join(source.remarks))
    return student


def _report_work(report: Report, config: RunConfig, counts: PatchCounts) -> None:
    context, target = counts.context.mean(), counts.target.mean()
    report.add("patches", f"{config.grid**2}: {context:.0f} visible and {target:.0f} predicted on average")
    flops = training_flops(config)
    parts = ", ".join(f"{name} {getattr(flops, name) / 1e9:.3g}" for name in ("encoder", "teacher", "predictor"))
    report.add("GFLOP per image", f"{flops.total / 1e9:.4g}: {parts}")


def _time(config: RunConfig, asked: CheckConfig, num_samples: int) -> str:
    """Say how long the whole run takes.

    Raises:
        ValueError: if the GPU asked for is not known.
    """
    ranks, images = _num_ranks(asked), config.optim.epochs * num_samples
    if asked.images_per_s is not None:
        hours = images / asked.images_per_s / 3600
        return f"{_duration(hours)} at {asked.images_per_s:g} images/s; {hours * ranks:,.3g} GPU-hours"
    here = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    name = asked.gpu or (here if peak_of(here) else "H100")
    peak = peak_of(name, config.optim.precision)
    if peak is None:
        raise ValueError(f"gpu must be A100, H100, H200, B200, L40S or RTX 4090, got {name!r}; or give images_per_s")
    per_gpu = _USUAL_SHARE * peak / training_flops(config).total
    gpu_hours = images / per_gpu / 3600
    return (
        f"{_duration(gpu_hours / ranks)}, {gpu_hours:,.3g} GPU-hours, at {100 * _USUAL_SHARE:.0f} % of the "
        f"{peak / 1e12:.0f} TFLOP/s of {name} ({per_gpu:,.0f} images/s each); images_per_s=... tells it from your speed"
    )


def _duration(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 2 else f"{60 * hours:.2g} min"


def memory_table(
    config: RunConfig, counts: PatchCounts, student: Student, ranks: int, *, micro_batch_size: int
) -> Table:
    """Lay out the estimate for every ZeRO stage, this run's marked."""
    encoder, predictor = (
        sum(parameter.numel() for parameter in part.parameters()) for part in (student.encoder, student.predictor)
    )
    own = _stage_of(config)
    columns = [f"ZeRO {stage}{' (this run)' if stage == own else ''}" for stage in STAGES]
    table = Table("GiB per GPU, roughly", title=f"memory with {micro_batch_size} images per micro-batch")
    for column in columns:
        table.add_column(column, justify="right")
    plain, kept = (
        [
            estimate_memory(
                config, counts, num_parameters=(encoder, predictor), world_size=ranks,
                micro_batch_size=micro_batch_size, stage=stage, checkpoints_activations=checkpointed,
            )
            for stage in STAGES
        ]
        for checkpointed in (False, True)
    )  # fmt: skip
    for name in ("weights", "gradients", "adam", "teacher", "bf16_copies", "activations", "workspace"):
        table.add_row(name.replace("_", " "), *(f"{getattr(memory, name) / _GIB:.3g}" for memory in plain))
    table.add_section()
    is_on = config.runtime.activation_checkpointing
    for name, memories, is_own in (("total", plain, not is_on), ("with activation checkpointing", kept, is_on)):
        numbers = (f"{memory.total / _GIB:.3g}" for memory in memories)
        table.add_row(f"{name}{' (this run)' if is_own else ''}", *numbers, style="bold" if is_own else None)
    return table


def _stage_of(config: RunConfig) -> int:
    if config.runtime.engine == "plain":
        return 0
    return 1 if config.runtime.zero_stage is None else config.runtime.zero_stage
