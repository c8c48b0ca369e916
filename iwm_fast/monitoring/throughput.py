"""Speed and memory of a run: images per second, model FLOPs utilisation (MFU), memory in use."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.flops import peak_flops, training_flops
from iwm_fast.runtime.distributed import RankInfo


def format_rate(per_s: float) -> str:
    """Format a rate per second for a message. Rates below 10 have two significant digits, others no decimals."""
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.2g}"


@dataclass(frozen=True, kw_only=True)
class ThroughputMeter:
    """Converts step times into the speed metrics of a run."""

    global_batch_size: int
    """Images per step over all ranks."""
    num_ranks: int
    """Number of ranks."""
    flops_per_image: float = 0.0
    """Operations of training on one image, two per multiply-add, without recomputation by activation checkpointing."""
    peak_flops: float | None = None
    """Peak operations per second of one rank's device; None if it is not known."""
    peak_name: str = ""
    """Device and precision that the peak belongs to."""

    def values(self, num_steps: int, time_s: float) -> dict[str, float]:
        """Return the speed metrics of a log row, for `num_steps` steps that took `time_s` seconds."""
        images_per_s = num_steps * self.global_batch_size / time_s
        metrics = {
            "speed/images_per_s": images_per_s,
            "speed/images_per_s_per_rank": images_per_s / self.num_ranks,
            "speed/step_s": time_s / num_steps,
        }
        mfu = self.mfu(images_per_s)
        return metrics if mfu is None else metrics | {"speed/mfu": mfu}

    def mfu(self, images_per_s: float) -> float | None:
        """Return the model FLOPs utilisation: the share of all ranks' peak that is reached, None if it is not known."""
        if self.peak_flops is None:
            return None
        return images_per_s * self.flops_per_image / (self.num_ranks * self.peak_flops)

    def __str__(self) -> str:
        work = f"{self.flops_per_image / 1e9:.3g} GFLOP per image"
        if self.peak_flops is None:
            return f"{work}; no speed/mfu: the peak of {self.peak_name} is not known"
        return f"{work}; speed/mfu is the share of {self.peak_flops / 1e12:.0f} TFLOP/s per rank, {self.peak_name}"


def build_throughput_meter(config: RunConfig, rank_info: RankInfo) -> ThroughputMeter:
    """Build the meter for a run's settings on this rank's device."""
    peak, name = peak_flops(rank_info.device, config.optim.precision)
    return ThroughputMeter(
        global_batch_size=config.optim.global_batch_size,
        num_ranks=rank_info.world_size,
        flops_per_image=training_flops(config).total,
        peak_flops=peak,
        peak_name=f"{name} with {config.optim.precision}",
    )


def used_memory_mb(device: torch.device) -> float:
    """Return memory in 10^6 bytes: on a GPU the peak of PyTorch's tensors, on a CPU what the process now uses."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    # The second field is the resident set size in pages.
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
