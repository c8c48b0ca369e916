"""What each micro-batch consists of, decided before a byte is read: samples, draws, masks.

A plan is a pure function from the micro-batch's number to a `Request`; loaders only carry requests out. So loaders
need no state, and the same request gives the same batch on any of them.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float32, Int64, UInt8
from torch import Tensor

from pipelines.actions import Draws, action_vector, clean_draws, draw
from pipelines.batch import Batch, RaggedIndex, normalize_view
from pipelines.config import MaskConfig, ViewConfig
from pipelines.masks import all_patches, draw_masks, ragged_index
from pipelines.order import SampleOrder
from pipelines.shards import ShardSet
from pipelines.tar_index import ShardError


@dataclass(frozen=True, kw_only=True)
class Request:
    """One micro-batch of one rank, as decided."""

    step: int
    slots: Int64[np.ndarray, "B"]
    samples: Int64[np.ndarray, "B"]
    draws: Draws
    action: Float32[np.ndarray, "B A"]
    context: RaggedIndex
    target: RaggedIndex


class EndOfPlanError(Exception):
    """There is no such micro-batch: the plan ends before it."""


@runtime_checkable
class Plan(Protocol):
    """The sequence of requests of one rank."""

    @property
    def largest(self) -> int:
        """Most images of one request."""
        ...

    def request(self, index: int) -> Request:
        """Return micro-batch number `index`; raises EndOfPlanError behind the last one."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The endless stream: position = step * global batch + slot, whoever asks."""

    views: ViewConfig
    mask: MaskConfig
    seed: int
    grid: int
    """Patches along one side of a view."""
    order: SampleOrder
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    @property
    def largest(self) -> int:
        """Most images of one request."""
        return self.micro_batch_size

    def request(self, index: int) -> Request:
        """Return micro-batch number `index` of this rank, counted from step 0."""
        accumulation = self.global_batch_size // (self.micro_batch_size * self.world_size)
        step, micro = divmod(index, accumulation)
        first = (micro * self.world_size + self.rank) * self.micro_batch_size
        slots = np.arange(first, first + self.micro_batch_size)
        draws = draw(self.views, self.seed, step, slots)
        # every rank draws the masks of the whole step, so that all know the number of patches the loss is divided by
        masks = draw_masks(self.mask, self.grid, self.seed, step, np.arange(self.global_batch_size))
        return Request(
            step=step,
            slots=slots,
            samples=self.order.samples_at(step * self.global_batch_size + slots),
            draws=draws,
            action=action_vector(draws.source, draws.target, self.views),
            context=ragged_index(masks.context[slots], int(masks.context.sum())),
            target=ragged_index(masks.target[slots], int(masks.target.sum())),
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Given samples once each, in order: the largest centred square, all patches, no change."""

    views: ViewConfig
    grid: int
    samples: Int64[np.ndarray, "samples"]
    micro_batch_size: int

    @property
    def largest(self) -> int:
        """Most images of one request."""
        return self.micro_batch_size

    def request(self, index: int) -> Request:
        """Return micro-batch number `index`; the last may be smaller.

        Raises:
            EndOfPlanError: behind the last sample.
        """
        slots = np.arange(len(self.samples))[index * self.micro_batch_size : (index + 1) * self.micro_batch_size]
        if len(slots) == 0:
            raise EndOfPlanError(f"no micro-batch {index}: {len(self.samples)} samples end before it")
        draws = clean_draws(len(slots))
        everything = all_patches(len(slots), self.grid * self.grid)
        return Request(
            step=0,
            slots=slots,
            samples=self.samples[slots],
            draws=draws,
            action=action_vector(draws.source, draws.target, self.views),
            context=everything,
            target=everything,
        )


def assemble(
    request: Request,
    shards: ShardSet,
    *,
    source_view: UInt8[Tensor, "B H W 3"],
    target_view: UInt8[Tensor, "B H W 3"],
    crop_window: Float32[np.ndarray, "B 4"],
    device: torch.device,
) -> Batch:
    """Put pixels and request together, on the device."""
    return Batch(
        source_view=normalize_view(source_view.to(device, non_blocking=True)),
        target_view=normalize_view(target_view.to(device, non_blocking=True)),
        action=torch.from_numpy(request.action).to(device, non_blocking=True),
        context=request.context.to(device),
        target=request.target.to(device),
        crop_window=torch.tensor(crop_window),
        label=torch.from_numpy(shards.labels(request.samples)),
        sample=torch.from_numpy(request.samples),
        slot=torch.from_numpy(request.slots),
        key=tuple(shards.key(int(sample)) for sample in request.samples),
        step=request.step,
    )


def undecodable(shards: ShardSet, sample: int, step: int) -> ShardError:
    """Name the sample whose bytes are no image."""
    (number,), _ = shards.locate(np.array([sample]))
    where = {"shard": shards.shards[number].path, "key": shards.key(sample)}
    return ShardError(f"cannot decode the image, drawn at step {step}", **where, remedy="replace it or leave it out")
