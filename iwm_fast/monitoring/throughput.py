"""How fast a run is: images and steps per second, share of the peak that its arithmetic reaches, memory."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from iwm_fast.config.run import RunConfig
from iwm_fast.monitoring.flops import peak_flops, training_flops
from iwm_fast.runtime.distributed import RankInfo


@dataclass(frozen=True, kw_only=True)
class ThroughputMeter:
    """What a run's speed is measured by."""

    global_batch_size: int
    """Images per step over all ranks."""
    num_ranks: int
    flops_per_image: float = 0.0
    """What an image's training needs, a multiply-add counted as two; what is computed again does not count."""
    peak_flops: float | None = None
    """Most that one rank's device computes per second; None if that is not known."""
    peak_name: str = ""
    """The device and arithmetic that peak is of."""

    def values(self, steps: int, time_s: float) -> dict[str, float]:
        """Return the numbers of a log row for so many steps in so many seconds."""
        images_per_s = steps * self.global_batch_size / time_s
        found = {
            "speed/images_per_s": images_per_s,
            "speed/images_per_s_per_rank": images_per_s / self.num_ranks,
            "speed/step_s": time_s / steps,
        }
        share = self.mfu(images_per_s)
        return found if share is None else found | {"speed/mfu": share}

    def mfu(self, images_per_s: float) -> float | None:
        """Return which share of all ranks' peak so many images per second are; None if the peak is not known."""
        if self.peak_flops is None:
            return None
        return images_per_s * self.flops_per_image / (self.num_ranks * self.peak_flops)

    def __str__(self) -> str:
        need = f"{self.flops_per_image / 1e9:.3g} GFLOP per image"
        if self.peak_flops is None:
            return f"{need}; no speed/mfu: the peak of {self.peak_name} is not known"
        return f"{need}; speed/mfu is the share of {self.peak_flops / 1e12:.0f} TFLOP/s per rank, {self.peak_name}"


def build_throughput_meter(config: RunConfig, rank_info: RankInfo) -> ThroughputMeter:
    """Return what the settings ask of the devices."""
    peak, name = peak_flops(rank_info.device, config.optim.precision)
    return ThroughputMeter(
        global_batch_size=config.optim.global_batch_size,
        num_ranks=rank_info.world_size,
        flops_per_image=training_flops(config).total,
        peak_flops=peak,
        peak_name=f"{name} with {config.optim.precision}",
    )


def used_memory_mb(device: torch.device) -> float:
    """Return the most that torch has had in use on a GPU, or what this process now has in memory, in 10^6 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
