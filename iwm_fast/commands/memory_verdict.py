"""The memory part of `iwm check`: whether a run fits on its GPU, and which settings would fit."""

from dataclasses import dataclass

import torch
from rich.table import Table

from iwm_fast.config.commands import CheckConfig
from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.flops import PatchCounts, memory_gb_of
from iwm_fast.monitoring.memory_estimate import ZERO_STAGES, MemoryEstimate, estimate_memory, largest_micro_batch

_BYTES_PER_GB = 1e9
_PURPOSES = ("weights", "gradients", "adam", "teacher", "bf16_copies", "activations", "workspace", "overhead", "margin")

_CAPTION = (
    "Not yet compared with a run on a GPU. Overhead: CUDA and DALI. Not included: NCCL, ZeRO's buffers, fragmentation."
)


@dataclass(frozen=True, kw_only=True)
class GpuMemory:
    """Memory of the GPU that a run is judged against."""

    size: float
    """Bytes."""
    source: str
    """Origin of the size, for the report."""


def gpu_memory(config: RunConfig, request: CheckConfig) -> GpuMemory | None:
    """Return the memory of the requested GPU, or of this machine's; None if neither is known.

    A data sheet's GB are read as 10^9 bytes. Drivers report up to 7 % more, so this is on the safe side.
    """
    if request.gpu_memory_gb is not None:
        return GpuMemory(size=request.gpu_memory_gb * _BYTES_PER_GB, source="gpu_memory_gb")
    if request.gpu:
        size = memory_gb_of(request.gpu)
        return None if size is None else GpuMemory(size=size * _BYTES_PER_GB, source=f"data sheet of {request.gpu}")
    if config.runtime.device == "cpu" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return GpuMemory(size=float(properties.total_memory), source=f"this machine's {properties.name}")


@dataclass(frozen=True, kw_only=True)
class MemoryVerdict:
    """Estimated memory of a run for all ZeRO stages, with and without activation checkpointing."""

    config: RunConfig
    counts: PatchCounts
    num_parameters: tuple[int, int]
    """Trained parameters of the encoder and of the predictor."""
    ranks: int
    micro_batch_size: int
    """Images per rank and forward pass of the run as configured."""
    gpu: GpuMemory | None
    """None if the run is not judged."""

    @property
    def stage(self) -> int:
        """ZeRO stage that the run trains with; the plain engine shards nothing, as stage 0."""
        if self.config.runtime.engine == "plain":
            return 0
        return 1 if self.config.runtime.zero_stage is None else self.config.runtime.zero_stage

    @property
    def total(self) -> float:
        """Estimated bytes per GPU of the run as configured."""
        return self.estimate(self.stage, self.config.runtime.activation_checkpointing).total

    @property
    def fits(self) -> bool | None:
        """Whether the run as configured fits; None if it is not judged."""
        return None if self.gpu is None else self.total <= self.gpu.size

    def estimate(
        self, stage: int, checkpoints_activations: bool, micro_batch_size: int | None = None
    ) -> MemoryEstimate:
        """Estimate the memory of one GPU; without a micro-batch size, for that of the run."""
        return estimate_memory(
            self.config,
            self.counts,
            num_parameters=self.num_parameters,
            world_size=self.ranks,
            micro_batch_size=micro_batch_size or self.micro_batch_size,
            stage=stage,
            checkpoints_activations=checkpoints_activations,
        )

    def largest_micro_batch(self, stage: int, checkpoints_activations: bool) -> int | None:
        """Return the largest micro-batch size that fits and divides the global batch; None if no size fits."""
        if self.gpu is None:
            return None
        share = self.config.optim.global_batch_size // self.ranks
        return largest_micro_batch(
            lambda size: self.estimate(stage, checkpoints_activations, size), share, self.gpu.size
        )

    def fitting_settings(self) -> str | None:
        """Return the settings that fit and differ least from the run's, as overrides; None if no settings fit."""
        runtime = self.config.runtime
        # Smaller micro-batches cost least, then recomputation; higher stages cost communication and gain least.
        # RuntimeConfig refuses torch.compile at stage 3.
        stages = [stage for stage in ZERO_STAGES if stage >= self.stage and not (stage == 3 and runtime.compile)]
        for stage in stages:
            for checkpoints_activations in sorted({runtime.activation_checkpointing, True}):
                size = self.largest_micro_batch(stage, checkpoints_activations)
                if size is None:
                    continue
                settings = [f"runtime.micro_batch_size={size}"]
                if checkpoints_activations != runtime.activation_checkpointing:
                    settings.append("runtime.activation_checkpointing=true")
                if stage != self.stage:
                    engine = ["runtime.engine=deepspeed"] if runtime.engine == "plain" else []
                    settings += [*engine, f"runtime.zero_stage={stage}"]
                return " ".join(settings)
        return None

    def sentence(self) -> str:
        """Return the verdict in one line."""
        if self.gpu is None:
            return "memory is not judged: no known GPU; set gpu=H100 or gpu_memory_gb=80"
        sizes = f"{self.total / _BYTES_PER_GB:.3g} of {self.gpu.size / _BYTES_PER_GB:.3g} GB per GPU"
        if self.fits:
            return f"fits: {sizes} (ZeRO {self.stage}, {self.micro_batch_size:,} images per micro-batch)"
        settings = self.fitting_settings()
        if settings is None:
            return f"does not fit: {sizes}, and no ZeRO stage or micro-batch fits"
        return f"does not fit: {sizes}; {settings} fits"

    def table(self) -> Table:
        """Return the estimates of all stages, and the largest micro-batches that fit."""
        title = f"memory with micro-batches of {self.micro_batch_size:,} images (this run's)"
        table = Table("GB per GPU, estimated", title=title, caption=_CAPTION)
        for stage in ZERO_STAGES:
            mark = "\nthis run" if stage == self.stage else ""
            table.add_column(f"ZeRO {stage}{mark}", justify="right")
        estimates = [self.estimate(stage, False) for stage in ZERO_STAGES]
        for name in _PURPOSES:
            table.add_row(name.replace("_", " "), *(_format_gb(getattr(estimate, name)) for estimate in estimates))
        for checkpoints_activations in (False, True):
            table.add_section()
            is_current = checkpoints_activations == self.config.runtime.activation_checkpointing
            name = "total with activation checkpointing" if checkpoints_activations else "total"
            totals = [self.estimate(stage, checkpoints_activations).total for stage in ZERO_STAGES]
            table.add_row(
                f"{name}{' (this run)' if is_current else ''}",
                *(_format_gb(total) for total in totals),
                style="bold" if is_current else None,
            )
            if self.gpu is None:
                continue
            size = self.gpu.size
            table.add_row(
                f"fits in {size / _BYTES_PER_GB:.3g} GB", *("yes" if total <= size else "no" for total in totals)
            )
            sizes = (self.largest_micro_batch(stage, checkpoints_activations) for stage in ZERO_STAGES)
            table.add_row(
                "largest runtime.micro_batch_size", *("none" if size is None else f"{size:,}" for size in sizes)
            )
        return table


def _format_gb(size: float) -> str:
    return f"{size / _BYTES_PER_GB:.3g}"
