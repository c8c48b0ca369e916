"""What training on top of a run says of itself: rows of numbers, and steps that were not finite."""

import logging
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from iwm_fast.monitoring.throughput import used_memory_mb
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo

log = logging.getLogger("iwm_fast")

_MOST_SHOWN = 8


@dataclass(frozen=True, kw_only=True)
class TunedStep:
    """What one optimiser step did on this rank."""

    loss: Tensor
    """Its share of the loss, a scalar on the device; summed over ranks, the mean over the global batch."""
    is_applied: bool
    """False if a loss or gradient was not finite on some rank, and no weight changed."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Of groups with lr_scale 1."""
    wait_s: float
    """Spent waiting for the loader."""
    keys: list[str]
    """Samples, to name in errors."""


class TuneLog:
    """What happened since the last log row."""

    def __init__(self, global_batch_size: int, rank_info: RankInfo) -> None:
        self._global_batch_size, self._rank_info = global_batch_size, rank_info
        self._begin()

    def _begin(self) -> None:
        self._steps: list[TunedStep] = []
        self._started = time.perf_counter()

    def add(self, step: TunedStep) -> None:
        """Count one step; nothing is waited for."""
        self._steps.append(step)

    def close(self) -> dict[str, float]:
        """Return the row's values, which every rank has a share in, and begin the next window; collective."""
        steps, time_s = self._steps, time.perf_counter() - self._started
        loss = torch.stack([step.loss for step in steps]).double().mean()
        own = [sum(step.wait_s for step in steps), used_memory_mb(self._rank_info.device)]
        ranks = distributed.join_over_ranks(torch.cat([loss[None], loss.new_tensor(own)])).cpu().view(-1, 3)
        self._begin()
        return {
            "loss/train": float(ranks[:, 0].sum()),
            "optim/lr": steps[-1].lr,
            "optim/grad_norm": steps[-1].grad_norm,
            "optim/skipped_steps": float(sum(not step.is_applied for step in steps)),
            "speed/images_per_s": len(steps) * self._global_batch_size / time_s,
            "speed/step_s": time_s / len(steps),
            "data/wait_share": float(ranks[:, 1].mean()) / time_s,
            "memory/used_mb": float(ranks[:, 2].max()),
        }


class SkipCount:
    """Steps in a row that were left out; every rank has one and is told of each step."""

    def __init__(self, rank_info: RankInfo, most: int) -> None:
        self._rank_info, self._most = rank_info, most
        self._in_a_row = 0
        self._message = ""

    @property
    def is_hopeless(self) -> bool:
        """Whether as many were skipped in a row as there may be."""
        return self._in_a_row >= self._most

    def add(self, number: int, step: TunedStep) -> None:
        """Take notice of the `number`-th step from 1; collective if it was skipped, which all ranks know alike."""
        self._in_a_row = 0 if step.is_applied else self._in_a_row + 1
        if step.is_applied:
            return
        suspects = distributed.gather_objects([] if bool(step.loss.isfinite()) else step.keys[:_MOST_SHOWN])
        shown = ", ".join(f"{rank}: {' '.join(keys)}" for rank, keys in enumerate(suspects) if keys)
        self._message = (
            f"{self._in_a_row} steps in a row were not finite, the last one step {number}; suspected samples by rank: "
            f"{shown or 'none, the losses were finite'}; lower tune.lr or look at these samples"
        )
        if self._rank_info.rank == 0:
            log.warning("step %d skipped, a loss or gradient was not finite; samples by rank: %s", number, shown)

    def end(self) -> None:
        """End training that is hopeless, with one message.

        Raises:
            FloatingPointError: on rank 0, naming samples of every rank.
        """
        raise FloatingPointError(self._message) if self._rank_info.rank == 0 else SystemExit(2)
