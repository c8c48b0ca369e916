"""`iwm check`: report within seconds, without training, what a run needs and whether it can start.

Nothing is written to the run folder, and no weights are allocated: parameters are counted on torch's meta device.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.checkpoints.pretrained import read_pretrained_weights
from iwm_fast.commands.measured_speed import DecodeRate, measure_decode_rate, measure_parts, predict_limit
from iwm_fast.commands.memory_verdict import MemoryVerdict, gpu_memory
from iwm_fast.config.batch_size import accumulation_steps, describe_large_batch
from iwm_fast.config.commands import CheckConfig
from iwm_fast.config.fingerprint import IMAGES_PER_FORWARD, fingerprint
from iwm_fast.config.run import OptimConfig, RunConfig
from iwm_fast.config.writable import require_writable
from iwm_fast.engines.deepspeed_engine import deepspeed_config
from iwm_fast.evals.online import require_measured
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.student import Student, build_student, choose_ops
from iwm_fast.monitoring.flops import KNOWN_GPUS, PatchCounts, gpu_peak_flops, patch_counts, training_flops
from iwm_fast.monitoring.metric_writer import require_logins
from iwm_fast.monitoring.throughput import format_rate
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.runtime.distributed import choose_device
from iwm_fast.runtime.extras import MissingPackageError
from iwm_fast.training.loaders import mixed_order, open_named_shards, open_training_shards
from iwm_fast.training.resume import resumed_state
from iwm_fast.training.schedules import total_steps

# A rule of thumb for the share of a GPU's peak that training reaches if the loader keeps up.
_TYPICAL_UTILISATION = 0.4
_MAX_CHANGES = 20
# Below this number of steps, a run is too short for warm-up and schedules to mean much. Chosen here.
_MIN_STEPS = 100

Value = TypeVar("Value")


@dataclass
class Report:
    """The results of all checks of one run."""

    rows: list[tuple[str, str]] = field(default_factory=list)
    """Rows of the printed table: the name of a check and its result."""
    problems: list[str] = field(default_factory=list)
    """Messages of the errors that would stop the run."""
    warnings: list[str] = field(default_factory=list)
    """Messages about settings that do not stop the run, but are probably a mistake."""

    def add(self, name: str, text: str) -> None:
        """Append a row to the printed table."""
        self.rows.append((name, text))

    def collect(self, name: str, compute: Callable[[], Value]) -> Value | None:
        """Return the value of `compute()`, or None if it raises an expected error, which is added to the problems."""
        try:
            return compute()
        # These are the errors that training reports to the user. Any other exception is a bug and keeps its traceback.
        except (ValueError, RuntimeError, OSError, ShardError, CheckpointError, MissingPackageError) as error:
            self.problems.append("\n".join([str(error), *getattr(error, "__notes__", ())]))
            self.add(name, "stops the run, see the message below")
            return None


def check_run(config: RunConfig, request: CheckConfig) -> bool:
    """Print what a run needs, warnings, and last whether it fits on its GPU; return False if it does not fit.

    Raises:
        ValueError: after everything is printed, if the run cannot start; the message lists all reasons.
    """
    report, verdict = inspect_run(config, request, measures_speed=True)
    console = Console()
    table = Table("check", "this run", title=f"{config.output.folder} on {_format_ranks(_num_ranks(request))}")
    for row in report.rows:
        table.add_row(*row)
    console.print(table)
    if verdict is not None:
        console.print(verdict.table())
    for warning in report.warnings:
        console.print(f"warning: {warning}", highlight=False, markup=False)
    # Soft wrapping leaves the verdict on one line, for scripts.
    if verdict is not None:
        console.print(verdict.sentence(), soft_wrap=True, highlight=False, markup=False)
    if report.problems:
        raise ValueError("this run cannot start:\n" + "\n".join(f"- {problem}" for problem in report.problems))
    return verdict is None or verdict.fits is not False


def inspect_run(
    config: RunConfig, request: CheckConfig, *, measures_speed: bool = False
) -> tuple[Report, MemoryVerdict | None]:
    """Return the report and the verdict on memory, which is None if the masks or the batch size are refused.

    With `measures_speed`, a few seconds more find what will limit a run that can start.
    """
    report, ranks = Report(), _num_ranks(request)
    shards = _report_shards(report, config)
    report.collect("output.loggers", lambda: require_logins(config.output.loggers))
    batch = _report_batch(report, config, ranks)
    _suggest_rates(report, config.optim)
    if shards is not None:
        _report_progress(report, config, shards, batch and batch[0] * ranks)
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
            rate = report.collect("time", lambda: _report_speed(report, config, request, shards))
            if measures_speed and batch is not None and not report.problems:
                report.collect(
                    "speed",
                    lambda: _report_limit(report, config, request, shards, micro_batch_size=batch[0], rate=rate),
                )
    if counts is None or batch is None:
        return report, None
    gpu = gpu_memory(config, request)
    if gpu is not None:
        report.add("GPU memory", f"{gpu.size / 1e9:.3g} GB ({gpu.source})")
    verdict = MemoryVerdict(
        config=config,
        counts=counts,
        num_parameters=(_num_parameters(student.encoder), _num_parameters(student.predictor)),
        ranks=ranks,
        micro_batch_size=batch[0],
        gpu=gpu,
    )
    return report, verdict


def _report_shards(report: Report, config: RunConfig) -> ShardSet | None:
    """Add the numbers of samples, and return the training shards if they can be used."""
    shards = report.collect("training samples", lambda: open_training_shards(config.data))
    if shards is not None:
        report.add("training samples", _describe_shards(shards))
    val = None
    if config.data.val:
        val = report.collect("validation samples", lambda: open_named_shards("data.val", config.data.val, config.data))
        if val is not None:
            report.add("validation samples", _describe_shards(val))
    elif config.output.evaluate_every:
        report.problems.append("data.val must name validation shards when output.evaluate_every is set, got ''")
    if config.output.evaluate_every and shards is not None and val is not None:
        report.collect("output.keep_best", lambda: require_measured(config, shards, val))
    return shards


def _report_batch(report: Report, config: RunConfig, ranks: int) -> tuple[int, int] | None:
    """Add the batch equation; return micro-batch size and micro-batches per step, None if they are refused."""
    batch = report.collect("batch", lambda: accumulation_steps(config, ranks))
    if batch is None:
        return None
    micro_batch_size, num_micro_batches = batch
    plural = "es" if num_micro_batches > 1 else ""
    factors = f"{_format_ranks(ranks)} x {micro_batch_size} images x {num_micro_batches} micro-batch{plural}"
    report.add("global batch", f"{config.optim.global_batch_size:,} = {factors}")
    images_per_forward = ranks * micro_batch_size
    if IMAGES_PER_FORWARD in fingerprint(config, "", images_per_forward=images_per_forward):
        report.warnings.append(
            f"{IMAGES_PER_FORWARD} = {images_per_forward:,} is part of what is learned, because VICReg's terms are "
            "statistics of these images; resuming needs the same product"
        )
    return batch


def _num_ranks(request: CheckConfig) -> int:
    if request.ranks is not None:
        return request.ranks
    # Launchers and job scripts set WORLD_SIZE; without it, assume one rank per GPU of this machine.
    launched = os.environ.get("WORLD_SIZE", "")
    return int(launched) if launched.isdigit() else torch.cuda.device_count() or 1


def _format_ranks(count: int) -> str:
    return f"{count} rank{'s' if count > 1 else ''}"


def _describe_shards(shards: ShardSet) -> str:
    labelled = 1 - shards.num_unlabelled / shards.num_samples
    return f"{shards.num_samples:,} in {len(shards.shards):,} shards, {100 * labelled:.1f} % with a label"


def _report_progress(report: Report, config: RunConfig, shards: ShardSet, images_per_forward: int | None) -> None:
    """Add the number of steps and the step at which the run starts."""
    per_epoch = shards.num_samples / config.optim.global_batch_size
    steps = total_steps(config.optim, shards.num_samples)
    report.add("steps", f"{per_epoch:,.1f} per epoch, {steps:,} in {config.optim.epochs:g} epochs")
    if config.data.mixture:
        report.add("sources", _describe_sources(config, shards, steps))
    warning = describe_large_batch("optim", config.optim.global_batch_size, shards.num_samples)
    if warning:
        report.warnings.append(warning)
    if steps < _MIN_STEPS:
        report.warnings.append(
            f"the run has only {steps:,} steps; set more optim.epochs or a smaller optim.global_batch_size"
        )
    report.collect("run folder", lambda: _report_folder(report, config, shards, images_per_forward))


def _describe_sources(config: RunConfig, shards: ShardSet, steps: int) -> str:
    """Return, for each source of a mixture, its share of the samples that are drawn and how often it is seen."""
    total = sum(source.weight for source in config.data.mixture)
    order = mixed_order(config, shards)
    epochs = order.epochs(steps * config.optim.global_batch_size)
    pairs = zip(config.data.mixture, order.sources, strict=True)
    return "\n".join(
        f"{source.name}: {100 * source.weight / total:.1f} % of each batch from {part.order.num_samples:,} samples, "
        f"seen {epochs[source.name]:.3g} times"
        for source, part in pairs
    )


def _suggest_rates(report: Report, optim: OptimConfig) -> None:
    """Add learning rates and teacher momentum for a batch that is not the recipe's, if all of them are the recipe's."""
    recipe = OptimConfig()
    factor = optim.global_batch_size / recipe.global_batch_size
    rates = ("lr", "lr_start", "lr_end")
    is_recipe = all(getattr(optim, name) == getattr(recipe, name) for name in (*rates, "teacher_momentum"))
    if factor == 1 or not is_recipe:
        return
    scaled = " ".join(f"optim.{name}={factor * getattr(recipe, name):.3g}" for name in rates)
    momentum = ",".join(f"{value**factor:.6g}" for value in recipe.teacher_momentum)
    batches = f"{optim.global_batch_size:,} / {recipe.global_batch_size:,}"
    report.add(
        "suggested values",
        f"{scaled}\n  the recipe's * {batches} (linear scaling, arXiv 1706.02677)\n"
        f"optim.teacher_momentum=[{momentum}]\n  the recipe's ** ({batches}) (arXiv 2307.13813)\n"
        "not verified for IWM",
    )


def _report_folder(report: Report, config: RunConfig, shards: ShardSet, images_per_forward: int | None) -> None:
    """Add what the run folder holds and how many steps remain; raise the errors that training would raise."""
    require_writable("output.folder", config.output.folder)
    folder = Path(config.output.folder)
    saved, damaged = checkpoints.read_newest(folder)
    is_used = saved is not None or (folder / "metrics.jsonl").exists()
    for path in damaged:
        report.add("damaged checkpoint", f"{path.name}; an older checkpoint is used instead")
    current = fingerprint(config, shards.sources_digest, images_per_forward=images_per_forward)
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
    start = resumed_state(saved, config, current, shards.num_samples).start
    last = total_steps(config.optim, shards.num_samples, start)
    remaining = f"{last - saved.step:,} steps, to step {last:,}" if saved.step < last else "none, the run is finished"
    report.add("remaining", remaining)


def _report_networks(report: Report, config: RunConfig) -> Student:
    """Add the parameter counts and the source of initial weights, and return the networks on the meta device."""
    # Meta tensors have shapes but no memory, so networks of any size can be counted here.
    with torch.device("meta"):
        student = build_student(config, REFERENCE)
    for name, network in (("encoder", student.encoder), ("predictor", student.predictor)):
        num_tensors = len(list(network.parameters()))
        report.add(f"{name} parameters", f"{_num_parameters(network) / 1e6:.2f} M in {num_tensors} tensors")
    ratio = _num_parameters(student.predictor) / _num_parameters(student.encoder)
    report.add("predictor / encoder", f"{ratio:.2f} of the parameters; summaries of the paper advise about 0.3")
    # A run that resumes loads the weights of its own checkpoint and never reads init_from.
    if config.init_from and checkpoints.find_newest_folder(Path(config.output.folder)) is None:
        source = report.collect("init_from", lambda: read_pretrained_weights(config, student))
        if source is not None:
            report.add("init_from", "\n".join(source.remarks))
    return student


def _num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def _report_work(report: Report, config: RunConfig, counts: PatchCounts) -> None:
    """Add the patches per view and the floating-point operations per image, averaged over drawn masks."""
    context, target = counts.context.mean(), counts.target.mean()
    report.add("patches", f"{config.grid**2} per view; on average {context:.0f} visible and {target:.0f} predicted")
    flops = training_flops(config)
    parts = ", ".join(f"{name} {getattr(flops, name) / 1e9:.3g}" for name in ("encoder", "teacher", "predictor"))
    report.add("GFLOP per image", f"{flops.total / 1e9:.4g} ({parts})")


def _report_speed(report: Report, config: RunConfig, request: CheckConfig, shards: ShardSet) -> DecodeRate | None:
    """Add the duration of all epochs, and the CPU cores that decode images at this speed; return a core's rate.

    Raises:
        ValueError: if neither peak nor memory of the requested GPU are known.
    """
    ranks, images = _num_ranks(request), config.optim.epochs * shards.num_samples
    images_per_s, remark = _estimate_speed(config, request)
    if images_per_s is None:
        report.add("time", remark)
        return None
    hours = images / images_per_s / 3600
    hint = "" if request.images_per_s else "; set images_per_s=... to use a measured speed"
    report.add("time", f"{_format_hours(hours)} at {remark}; {hours * ranks:,.3g} GPU-hours{hint}")
    if config.runtime.loader != "dali":
        return None
    return report.collect("decoding", lambda: _report_decoding(report, config, shards, images_per_s, ranks))


def _estimate_speed(config: RunConfig, request: CheckConfig) -> tuple[float | None, str]:
    """Return the images per second over all ranks, None if they are not known, and where the number comes from.

    Raises:
        ValueError: if neither peak nor memory of the requested GPU are known.
    """
    if request.images_per_s is not None:
        return request.images_per_s, f"{request.images_per_s:g} images/s"
    local_gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else ""
    name = request.gpu or (local_gpu if gpu_peak_flops(local_gpu) else "H100")
    peak = gpu_peak_flops(name, config.optim.precision)
    if peak is None and request.gpu_memory_gb is None:
        raise ValueError(f"gpu must be {KNOWN_GPUS}, got {name!r}; or set gpu_memory_gb and images_per_s")
    if peak is None:
        return None, f"not known, because the peak of {name} is not; set images_per_s"
    images_per_s = _TYPICAL_UTILISATION * peak / training_flops(config).total
    return _num_ranks(request) * images_per_s, (
        f"{100 * _TYPICAL_UTILISATION:.0f} % of the {peak / 1e12:.0f} TFLOP/s of {name} "
        f"({format_rate(images_per_s)} images/s per GPU)"
    )


def _report_decoding(
    report: Report, config: RunConfig, shards: ShardSet, images_per_s: float, ranks: int
) -> DecodeRate:
    """Measure how fast a core decodes the run's images, and add how many of them keep up with training."""
    rate = measure_decode_rate(config, shards)
    report.add("decoding", rate.describe(images_per_s, ranks))
    needed, threads = rate.cores_for(images_per_s / ranks), config.runtime.loader_threads
    if config.runtime.decode == "cpu" and threads < needed:
        report.warnings.append(
            f"runtime.loader_threads = {threads} decode about {format_rate(threads * rate.images_per_s)} images/s "
            f"per rank, but {format_rate(images_per_s / ranks)} are asked for; set runtime.loader_threads={needed}, "
            "or runtime.decode=gpu"
        )
    return rate


def _report_limit(
    report: Report,
    config: RunConfig,
    request: CheckConfig,
    shards: ShardSet,
    *,
    micro_batch_size: int,
    rate: DecodeRate | None,
) -> None:
    """Add how fast a rank reads, decodes and computes, and which of them will limit the run."""
    ranks = _num_ranks(request)
    is_on_gpu = bool(request.gpu) or choose_device(config.runtime.device).type == "cuda"
    given = request.images_per_s / ranks if request.images_per_s else None
    speeds = measure_parts(config, shards, micro_batch_size, rate, given_speed=given, is_on_gpu=is_on_gpu)
    # Ranks share the cores of this machine, unless the run is meant for another one.
    ranks_here = 0 if request.gpu else min(ranks, torch.cuda.device_count() or ranks)
    speeds = [speed.on_shared_cores(ranks_here) for speed in speeds]
    report.add("speed per rank", "\n".join(map(str, speeds)))
    report.add("limit", predict_limit(config, speeds, is_on_gpu=is_on_gpu))
    known = [speed.images_per_s for speed in speeds if speed.images_per_s is not None]
    if speeds[-1].images_per_s is not None:
        hours = config.optim.epochs * shards.num_samples / (ranks * min(known)) / 3600
        report.add("time at this speed", f"about {_format_hours(hours)} for all epochs")


def _format_hours(hours: float) -> str:
    return f"{hours:,.1f} h" if hours >= 2 else f"{60 * hours:.2g} min"
