"""`iwm check`: report within seconds, without training, what a run needs and whether it can start.

Nothing is written to the run folder, and no weights are allocated: parameters are counted on torch's meta device.
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

# A rule of thumb for the share of a GPU's peak that training reaches if the loader keeps up.
_TYPICAL_UTILISATION = 0.4
_MAX_CHANGES = 20
_BYTES_PER_GIB = 2**30

Value = TypeVar("Value")


@dataclass
class Report:
    """The results of all checks of one run."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    """Rows of the printed table: the name of a check and its result."""
    problems: list[str] = field(default_factory=list)
    """Messages of the errors that would stop the run."""

    def add(self, name: str, text: str) -> None:
        """Append a row to the printed table."""
        self.rows.append((name, text))

    def collect(self, name: str, compute: Callable[[], Value]) -> Value | None:
        """Return the value of `compute()`, or None if it raises an expected error, which is added to the problems."""
        try:
            return compute()
        # These are the errors that training reports to the user. Any other exception is a bug and keeps its traceback.
        except (ValueError, RuntimeError, OSError, ShardError, CheckpointError) as error:
            self.problems.append("\n".join([str(error), *getattr(error, "__notes__", ())]))
            self.add(name, "stops the run, see the message below")
            return None


def check_run(config: RunConfig, request: CheckConfig) -> None:
    """Print what a run needs, and the memory it takes per GPU.

    Raises:
        ValueError: after the tables are printed, if the run cannot start; the message lists all reasons.
    """
    report, memory = inspect_run(config, request)
    console = Console()
    table = Table("check", "this run", title=f"{config.output.folder} on {_format_ranks(_num_ranks(request))}")
    for row in report.rows:
        table.add_row(*row)
    console.print(table)
    if memory is not None:
        console.print(memory)
    if report.problems:
        raise ValueError("this run cannot start:\n" + "\n".join(f"- {problem}" for problem in report.problems))


def inspect_run(config: RunConfig, request: CheckConfig) -> tuple[Report, Table | None]:
    """Return the report and the memory table, which is None if the masks or the batch size are refused."""
    report, ranks = Report(), _num_ranks(request)
    shards = report.collect("training samples", lambda: open_training_shards(config.data))
    if shards is not None:
        report.add("training samples", _describe_shards(shards))
    if config.data.val:
        val = report.collect("validation samples", lambda: open_shards(config.data.val))
        if val is not None:
            report.add("validation samples", _describe_shards(val))
    elif config.output.evaluate_every:
        report.problems.append("data.val must name validation shards when output.evaluate_every is set, got ''")
    batch = report.collect("batch", lambda: accumulation_steps(config, ranks))
    if batch is not None:
        micro_batch_size, num_micro_batches = batch
        plural = "es" if num_micro_batches > 1 else ""
        factors = f"{_format_ranks(ranks)} x {micro_batch_size} images x {num_micro_batches} micro-batch{plural}"
        report.add("global batch", f"{config.optim.global_batch_size:,} = {factors}")
    if shards is not None:
        _report_progress(report, config, shards)
    student = _report_networks(report, config)
    # A run that is meant for another GPU may find no device and no kernels on this machine.
    if not request.gpu:
        report.collect("runtime", lambda: choose_ops(config, choose_device(config.runtime.device)))
    # The configuration is computed only for its errors: conflicts between runtime.deepspeed and our own settings.
    if batch is not None and config.runtime.engine == "deepspeed":
        report.collect("runtime.deepspeed", lambda: deepspeed_config(config, ranks))
    counts = report.collect("masks", lambda: patch_counts(config))
    if counts is not None:
        _report_work(report, config, counts)
        if shards is not None:
            report.collect("time", lambda: report.add("time", _estimate_time(config, request, shards.num_samples)))
    if counts is None or batch is None:
        return report, None
    return report, memory_table(config, counts, student, ranks, micro_batch_size=batch[0])


def _num_ranks(request: CheckConfig) -> int:
    if request.ranks is not None:
        return request.ranks
    # Launchers and job scripts set WORLD_SIZE; without it, assume one rank per GPU of this machine.
    launched = os.environ.get("WORLD_SIZE", "")
    return int(launched) if launched.isdigit() else torch.cuda.device_count() or 1


def _format_ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _describe_shards(shards: ShardSet) -> str:
    # The label -1 marks a sample without a label.
    labelled = float(np.mean(shards.labels(np.arange(shards.num_samples)) >= 0))
    return f"{shards.num_samples:,} in {len(shards.shards):,} shards, {100 * labelled:.1f} % with a label"


def _report_progress(report: Report, config: RunConfig, shards: ShardSet) -> None:
    """Add the number of steps and the step at which the run starts."""
    per_epoch = shards.num_samples / config.optim.global_batch_size
    steps = total_steps(config.optim, shards.num_samples)
    report.add("steps", f"{per_epoch:,.1f} per epoch, {steps:,} in {config.optim.epochs:g} epochs")
    report.collect("run folder", lambda: _report_folder(report, config, shards))


def _report_folder(report: Report, config: RunConfig, shards: ShardSet) -> None:
    """Add what the run folder holds and how many steps remain; raise the errors that training would raise."""
    folder = Path(config.output.folder)
    saved, damaged = checkpoints.read_newest(folder)
    is_used = saved is not None or (folder / "metrics.jsonl").exists()
    for path in damaged:
        report.add("damaged checkpoint", f"{path.name}; an older checkpoint is used instead")
    current = fingerprint(config, shards.content_digest)
    # These rows come before the errors, so that a user whose run is refused still sees all settings that differ.
    if saved is not None:
        report.add("run folder", f"holds a run at step {saved.step:,}")
        names = sorted(saved.fingerprint.keys() | current.keys())
        changed = [name for name in names if saved.fingerprint.get(name) != current.get(name)]
        lines = [f"{name}: {saved.fingerprint.get(name)} -> {current.get(name)}" for name in changed[:_MAX_CHANGES]]
        report.add("changed settings", "\n".join(lines) or "none that affects the result")
    if is_used and config.resume == "never":
        raise ValueError(
            f"output.folder = {config.output.folder!r} already holds a run; "
            "choose another folder, or set resume=auto to continue that run"
        )
    if saved is None:
        report.add("run folder", "holds no checkpoint; training starts at step 0")
        return
    start = stream_start(saved, config, current, shards.num_samples)
    last = total_steps(config.optim, shards.num_samples, start)
    remaining = f"{last - saved.step:,} steps, to step {last:,}" if saved.step < last else "none, the run is finished"
    report.add("remaining", remaining)


def _report_networks(report: Report, config: RunConfig) -> Student:
    """Add the parameter counts and the source of initial weights, and return the networks on the meta device."""
    # Meta tensors have shapes but no memory, so networks of any size can be counted here.
    with torch.device("meta"):
        student = build_student(config, REFERENCE)
    for name, network in (("encoder", student.encoder), ("predictor", student.predictor)):
        sizes = [parameter.numel() for parameter in network.parameters()]
        report.add(f"{name} parameters", f"{sum(sizes) / 1e6:.2f} M in {len(sizes)} tensors")
    # A run that resumes loads the weights of its own checkpoint and never reads init_from.
    if config.init_from and checkpoints.newest(Path(config.output.folder)) is None:
        source = report.collect("init_from", lambda: read_source(config, student))
        if source is not None:
            report.add("init_from", "\n".join(source.remarks))
    return student


def _report_work(report: Report, config: RunConfig, counts: PatchCounts) -> None:
    """Add the patches per view and the floating-point operations per image, averaged over drawn masks."""
    context, target = counts.context.mean(), counts.target.mean()
    report.add("patches", f"{config.grid**2} per view; on average {context:.0f} visible and {target:.0f} predicted")
    flops = training_flops(config)
    parts = ", ".join(f"{name} {getattr(flops, name) / 1e9:.3g}" for name in ("encoder", "teacher", "predictor"))
    report.add("GFLOP per image", f"{flops.total / 1e9:.4g} ({parts})")


def _estimate_time(config: RunConfig, request: CheckConfig, num_samples: int) -> str:
    """Return the duration of all epochs and the GPU-hours, as text.

    Raises:
        ValueError: if the peak of the requested GPU is not known.
    """
    ranks, images = _num_ranks(request), config.optim.epochs * num_samples
    if request.images_per_s is not None:
        hours = images / request.images_per_s / 3600
        return f"{_format_hours(hours)} at {request.images_per_s:g} images/s; {hours * ranks:,.3g} GPU-hours"
    local_gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    name = request.gpu or (local_gpu if peak_of(local_gpu) else "H100")
    peak = peak_of(name, config.optim.precision)
    if peak is None:
        raise ValueError(f"gpu must be A100, H100, H200, B200, L40S or RTX 4090, got {name!r}; or set images_per_s")
    images_per_s = _TYPICAL_UTILISATION * peak / training_flops(config).total
    gpu_hours = images / images_per_s / 3600
    return (
        f"{_format_hours(gpu_hours / ranks)}, {gpu_hours:,.3g} GPU-hours, at {100 * _TYPICAL_UTILISATION:.0f} % of the "
        f"{peak / 1e12:.0f} TFLOP/s of {name} ({images_per_s:,.0f} images/s per GPU); "
        "set images_per_s=... to use a measured speed"
    )


def _format_hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 2 else f"{60 * hours:.2g} min"


def memory_table(
    config: RunConfig, counts: PatchCounts, student: Student, ranks: int, *, micro_batch_size: int
) -> Table:
    """Return a table of the estimated memory per GPU for all ZeRO stages, with and without activation checkpointing."""
    encoder, predictor = (
        sum(parameter.numel() for parameter in network.parameters()) for network in (student.encoder, student.predictor)
    )
    current_stage = _zero_stage(config)
    table = Table("GiB per GPU, estimated", title=f"memory with {micro_batch_size} images per micro-batch")
    for stage in STAGES:
        table.add_column(f"ZeRO {stage}{' (this run)' if stage == current_stage else ''}", justify="right")
    without_checkpointing, with_checkpointing = (
        [
            estimate_memory(
                config, counts, num_parameters=(encoder, predictor), world_size=ranks,
                micro_batch_size=micro_batch_size, stage=stage, checkpoints_activations=checkpoints_activations,
            )
            for stage in STAGES
        ]
        for checkpoints_activations in (False, True)
    )  # fmt: skip
    for name in ("weights", "gradients", "adam", "teacher", "bf16_copies", "activations", "workspace"):
        cells = (f"{getattr(memory, name) / _BYTES_PER_GIB:.3g}" for memory in without_checkpointing)
        table.add_row(name.replace("_", " "), *cells)
    table.add_section()
    is_on = config.runtime.activation_checkpointing
    for name, memories, is_current in (
        ("total", without_checkpointing, not is_on),
        ("total with activation checkpointing", with_checkpointing, is_on),
    ):
        cells = (f"{memory.total / _BYTES_PER_GIB:.3g}" for memory in memories)
        table.add_row(f"{name}{' (this run)' if is_current else ''}", *cells, style="bold" if is_current else None)
    return table


def _zero_stage(config: RunConfig) -> int:
    """Return the ZeRO stage that the run trains with; the plain engine shards nothing, as stage 0."""
    if config.runtime.engine == "plain":
        return 0
    return 1 if config.runtime.zero_stage is None else config.runtime.zero_stage
