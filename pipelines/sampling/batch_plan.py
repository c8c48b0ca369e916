"""What each micro-batch consists of, decided before a byte is read: samples, draws, masks.

A plan is a pure function from the micro-batch's number to a `Request`; loaders only carry requests out. So loaders
need no state, and the same request gives the same batch on any of them.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from iwm_fast.pipelines.batch import RaggedIndex
from iwm_fast.pipelines.config import MaskConfig, RandAugmentConfig, ViewConfig
from iwm_fast.pipelines.sampling.masks import Masks, all_patches, draw_masks, ragged_index
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.transforms.parameters import AugmentDraws, Draws, draw, draw_augment, identity_draws


@dataclass(frozen=True, kw_only=True)
class Request:
    """One micro-batch of one rank, as decided."""

    step: int
    slots: Int64[np.ndarray, "B"]
    samples: Int64[np.ndarray, "B"]
    """What is shown."""
    scheduled_samples: Int64[np.ndarray, "B"]
    """What the order put there; differs from `samples` where that cannot be decoded."""
    draws: Draws
    context: RaggedIndex
    target: RaggedIndex
    augment: AugmentDraws | None = None
    """Given where RandAugment is wanted: then source and target view are the same augmented image."""


@dataclass(frozen=True, kw_only=True)
class StreamStart:
    """Where the stream of samples begins: for ever at the beginning, unless an epoch was begun again."""

    step: int = 0
    """First step under the present settings."""
    position: int = 0
    """Its first position in the endless order: a multiple of the number of samples."""


BEGINNING = StreamStart()
"""Of a run that never had other settings."""


class EndOfPlanError(Exception):
    """There is no such micro-batch: the plan ends before it."""


@runtime_checkable
class BatchPlan(Protocol):
    """The sequence of requests of one rank."""

    @property
    def views(self) -> ViewConfig:
        """How views are made."""
        ...

    @property
    def augment(self) -> RandAugmentConfig | None:
        """What RandAugment does, for finetuning only."""
        ...

    @property
    def max_batch_size(self) -> int:
        """Most images of one request."""
        ...

    def request(self, index: int) -> Request:
        """Return micro-batch number `index`; raises EndOfPlanError behind the last one."""
        ...

    def fallback_samples(self, request: Request, image: int) -> Int64[np.ndarray, "samples"]:
        """Return which samples may stand in for an image that cannot be decoded, the first choice first."""
        ...


@dataclass(frozen=True, kw_only=True)
class SampleStream:
    """One rank's share of the endless order: position = step * global batch + slot, counted from its start."""

    order: SampleOrder
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    start: StreamStart = BEGINNING

    def slots_of(self, index: int) -> tuple[int, Int64[np.ndarray, "B"]]:
        """Return step and slots of this rank's micro-batch number `index`, counted from step 0."""
        accumulation = self.global_batch_size // (self.micro_batch_size * self.world_size)
        step, micro = divmod(index, accumulation)
        first = (micro * self.world_size + self.rank) * self.micro_batch_size
        return step, np.arange(first, first + self.micro_batch_size)

    def samples(self, step: int, slots: Int64[np.ndarray, "slots"]) -> Int64[np.ndarray, "slots"]:
        """Return what the order puts into slots of a step."""
        first = self.start.position + (step - self.start.step) * self.global_batch_size
        return self.order.samples_at(first + slots)


# the micro-batches of one step follow each other
@lru_cache(maxsize=2)
def _masks_of_step(mask: MaskConfig, grid: int, seed: int, step: int, global_batch_size: int) -> Masks:
    return draw_masks(mask, grid, seed, step, np.arange(global_batch_size))


@dataclass(frozen=True, kw_only=True)
class _StreamPlan:
    """What the two endless plans share: each is one rank's share of a stream."""

    views: ViewConfig
    seed: int
    grid: int
    """Patches along one side of a view."""
    stream: SampleStream

    @property
    def max_batch_size(self) -> int:
        """Most images of one request."""
        return self.stream.micro_batch_size

    def fallback_samples(self, request: Request, image: int) -> Int64[np.ndarray, "samples"]:
        """Return the samples of the following slots of the global batch: the same for any number of ranks."""
        slots = (request.slots[image] + np.arange(1, self.stream.global_batch_size)) % self.stream.global_batch_size
        return self.stream.samples(request.step, slots)


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(_StreamPlan):
    """Pretraining: two views and masks for every slot of the stream."""

    mask: MaskConfig
    augment: None = None

    def request(self, index: int) -> Request:
        """Return micro-batch number `index` of this rank, counted from step 0."""
        step, slots = self.stream.slots_of(index)
        samples = self.stream.samples(step, slots)
        # every rank draws the masks of the whole step, so that all know the number of patches the loss is divided by
        masks = _masks_of_step(self.mask, self.grid, self.seed, step, self.stream.global_batch_size)
        return Request(
            step=step,
            slots=slots,
            samples=samples,
            scheduled_samples=samples,
            draws=draw(self.views, self.seed, step, slots),
            context=ragged_index(masks.context[slots], int(masks.context.sum())),
            target=ragged_index(masks.target[slots], int(masks.target.sum())),
        )


@dataclass(frozen=True, kw_only=True)
class FinetunePlan(_StreamPlan):
    """Finetuning: one crop for every slot of the stream, all patches, no action. Of `views`, size, crop and flip."""

    augment: RandAugmentConfig | None
    """What else is done to the crop; None: nothing."""

    def request(self, index: int) -> Request:
        """Return micro-batch number `index` of this rank, counted from step 0."""
        step, slots = self.stream.slots_of(index)
        drawn = draw(self.views, self.seed, step, slots)
        return _whole_images(
            step,
            slots,
            self.stream.samples(step, slots),
            self.grid,
            draws=replace(identity_draws(len(slots)), crop=drawn.crop, flip=drawn.flip),
            augment=None if self.augment is None else draw_augment(self.augment, self.seed, step, slots),
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Given samples once each, in order: the largest centred square, all patches, no change."""

    views: ViewConfig
    grid: int
    samples: Int64[np.ndarray, "samples"]
    micro_batch_size: int
    augment: None = None

    @property
    def max_batch_size(self) -> int:
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
        return _whole_images(0, slots, self.samples[slots], self.grid, draws=identity_draws(len(slots)))

    def fallback_samples(self, request: Request, image: int) -> Int64[np.ndarray, "samples"]:
        """Return none: a measurement on other samples would be another measurement."""
        return np.empty(0, np.int64)


def _whole_images(
    step: int,
    slots: Int64[np.ndarray, "B"],
    samples: Int64[np.ndarray, "B"],
    grid: int,
    *,
    draws: Draws,
    augment: AugmentDraws | None = None,
) -> Request:
    """Return a request for all patches of one view."""
    patches = all_patches(len(slots), grid * grid)
    return Request(
        step=step,
        slots=slots,
        samples=samples,
        scheduled_samples=samples,
        draws=draws,
        context=patches,
        target=patches,
        augment=augment,
    )
