"""The contents of every micro-batch, decided before a byte is read: samples, random parameters and masks.

A plan is a pure function from the number of a micro-batch to a `Request`, and a loader only executes requests. Loaders
therefore have no state to save, and all of them return the same batch for the same request.
"""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64

from iwm_fast.pipelines.batch import RaggedIndex
from iwm_fast.pipelines.config import MaskConfig, RandAugmentConfig
from iwm_fast.pipelines.sampling.masks import Masks, all_patches, draw_masks, ragged_index
from iwm_fast.pipelines.sampling.mixture import MixedOrder
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.transforms.composition import Draws, ViewConfig, draw, identity_draws
from iwm_fast.pipelines.transforms.rand_augment import AugmentDraws, draw_augment


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a loader has to load and render for one micro-batch of one rank; B is the number of images."""

    step: int
    """Optimiser step."""
    slots: Int64[np.ndarray, "B"]
    """Positions in the global batch."""
    samples: Int64[np.ndarray, "B"]
    """Numbers of the samples to show."""
    scheduled_samples: Int64[np.ndarray, "B"]
    """Samples that the order assigns to the slots; `samples` differs where one of them cannot be decoded."""
    draws: Draws
    """Random parameters of both views."""
    context: RaggedIndex
    """Visible patches of the source view."""
    target: RaggedIndex
    """Patches to predict."""
    augment: AugmentDraws | None = None
    """Random parameters of RandAugment; if set, source and target view are the same augmented image."""


@dataclass(frozen=True, kw_only=True)
class StreamStart:
    """The step and position at which the present settings took over the stream of samples.

    Both are 0 unless a run was resumed with data.restart_epoch, which starts its current epoch again.
    """

    step: int = 0
    """First step with the present settings."""
    position: int = 0
    """Position of that step's first sample in the endless order: a multiple of the number of samples."""

    def position_of(self, step: int, global_batch_size: int) -> int:
        """Return the position of a step's first sample in the endless order."""
        return self.position + (step - self.step) * global_batch_size


BEGINNING = StreamStart()
"""Start of a run whose settings have never changed."""


class EndOfPlanError(Exception):
    """Raised for a micro-batch after the last one of a plan."""


@runtime_checkable
class BatchPlan(Protocol):
    """The sequence of requests of one rank."""

    @property
    def views(self) -> ViewConfig:
        """Settings of the views."""
        ...

    @property
    def augment(self) -> RandAugmentConfig | None:
        """Settings of RandAugment; None to apply no RandAugment."""
        ...

    @property
    def max_batch_size(self) -> int:
        """Largest number of images in a request."""
        ...

    @property
    def world_size(self) -> int:
        """Number of ranks that share the samples."""
        ...

    def request(self, index: int) -> Request:
        """Return the request of micro-batch number `index`.

        Raises:
            EndOfPlanError: if the plan ends before that micro-batch.
        """
        ...

    def fallback_samples(self, request: Request, image: int) -> Int64[np.ndarray, "samples"]:
        """Return the samples that may replace image number `image` if it cannot be decoded, in order of preference."""
        ...


@dataclass(frozen=True, kw_only=True)
class SampleStream:
    """One rank's share of the endless order of samples.

    Slot s of step t holds the sample at position `start.position_of(t, global_batch_size) + s`; in a mixture, the next
    sample of the source that fills the slot.
    """

    order: SampleOrder | MixedOrder
    global_batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int
    start: StreamStart = BEGINNING

    def slots_of(self, index: int) -> tuple[int, Int64[np.ndarray, "B"]]:
        """Return step and slots of this rank's micro-batch number `index`, counted from step 0."""
        # A step's slots are dealt out to the micro-batches in turn, and within a micro-batch to the ranks, so that the
        # global batch has the same slots for any number of ranks and any micro-batch size.
        accumulation = self.global_batch_size // (self.micro_batch_size * self.world_size)
        step, micro = divmod(index, accumulation)
        first = (micro * self.world_size + self.rank) * self.micro_batch_size
        return step, np.arange(first, first + self.micro_batch_size)

    def samples(self, step: int, slots: Int64[np.ndarray, "slots"]) -> Int64[np.ndarray, "slots"]:
        """Return the numbers of the samples in these slots of a step."""
        size = self.global_batch_size
        position = self.start.position_of(step, size)
        return self.order.batch_samples(slots, step=step, position=position, size=size)


# All micro-batches of a step need the masks of its global batch. Two entries are enough, since a plan is read in order.
@lru_cache(maxsize=2)
def _masks_of_step(mask: MaskConfig, grid: int, seed: int, step: int, global_batch_size: int) -> Masks:
    return draw_masks(mask, grid, seed, step, np.arange(global_batch_size))


@dataclass(frozen=True, kw_only=True)
class _EndlessPlan:
    """Base of the plans that never end: their samples come from one rank's share of the endless order."""

    views: ViewConfig
    seed: int
    grid: int
    """Number of patches along one side of a view."""
    stream: SampleStream

    @property
    def max_batch_size(self) -> int:
        """Largest number of images in a request."""
        return self.stream.micro_batch_size

    @property
    def world_size(self) -> int:
        """Number of ranks that share the samples."""
        return self.stream.world_size

    def fallback_samples(self, request: Request, image: int) -> Int64[np.ndarray, "samples"]:
        """Return the samples of the following slots in the global batch, which do not depend on the number of ranks."""
        slots = (request.slots[image] + np.arange(1, self.stream.global_batch_size)) % self.stream.global_batch_size
        return self.stream.samples(request.step, slots)


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(_EndlessPlan):
    """Plan of pretraining: two views and masks for every slot of the stream."""

    mask: MaskConfig
    augment: None = None

    def request(self, index: int) -> Request:
        """Return the request of this rank's micro-batch number `index`, counted from step 0."""
        step, slots = self.stream.slots_of(index)
        samples = self.stream.samples(step, slots)
        # Every rank draws the masks of the global batch and so knows the loss's divisor without communication.
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
class FinetunePlan(_EndlessPlan):
    """Plan of finetuning: one crop for every slot of the stream, with all patches and a zero action.

    Only the size, crop and flip settings of `views` have an effect.
    """

    augment: RandAugmentConfig | None

    def request(self, index: int) -> Request:
        """Return the request of this rank's micro-batch number `index`, counted from step 0."""
        step, slots = self.stream.slots_of(index)
        drawn = draw(self.views, self.seed, step, slots)
        return _unmasked_request(
            step,
            slots,
            self.stream.samples(step, slots),
            self.grid,
            draws=replace(identity_draws(self.views, len(slots)), crop=drawn.crop, flip=drawn.flip),
            augment=None if self.augment is None else draw_augment(self.augment, self.seed, step, slots),
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationPlan:
    """Plan of an evaluation: all patches of the largest centred square of each sample, once and in order."""

    views: ViewConfig
    grid: int
    samples: Int64[np.ndarray, "samples"]
    micro_batch_size: int
    leaves_out_bad_samples: bool = False
    """Whether a sample that cannot be decoded is replaced. The caller drops the replacement, which it recognises by
    `Batch.sample` and `Batch.scheduled_sample`, which differ."""
    augment: None = None
    world_size: int = 1
    """Number of ranks that share the samples: one, because each rank has a plan with samples of its own."""

    @property
    def max_batch_size(self) -> int:
        """Largest number of images in a request."""
        return self.micro_batch_size

    def request(self, index: int) -> Request:
        """Return the request of micro-batch number `index`; the last micro-batch may be smaller.

        Raises:
            EndOfPlanError: if the samples end before that micro-batch.
        """
        first = index * self.micro_batch_size
        slots = np.arange(first, min(first + self.micro_batch_size, len(self.samples)))
        if len(slots) == 0:
            raise EndOfPlanError(f"no micro-batch {index}: {len(self.samples)} samples end before it")
        return _unmasked_request(0, slots, self.samples[slots], self.grid, draws=identity_draws(self.views, len(slots)))

    def fallback_samples(self, request: Request, image: int) -> Int64[np.ndarray, "samples"]:
        """Return the samples that follow if bad ones are left out, otherwise none.

        An evaluation on other samples would measure something else.
        """
        if not self.leaves_out_bad_samples:
            return np.empty(0, np.int64)
        slot = int(request.slots[image])
        return self._samples_twice[slot + 1 : slot + len(self.samples)]

    @cached_property
    def _samples_twice(self) -> Int64[np.ndarray, "samples"]:
        # Any rotation of the samples is a slice of this array, so no copy is made for each bad image.
        return np.concatenate([self.samples, self.samples])


def _unmasked_request(
    step: int,
    slots: Int64[np.ndarray, "B"],
    samples: Int64[np.ndarray, "B"],
    grid: int,
    *,
    draws: Draws,
    augment: AugmentDraws | None = None,
) -> Request:
    """Return a request in which context and target are all patches."""
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
