"""Trains and evaluates semantic segmentation: a linear classifier of patches, on tokens of encoder or predictor.

In training, views are random crops, mirrored at random; in validation, they are the largest centred square.
Segmentation maps are cropped and mirrored in the same way. The logits of patches are upsampled bilinearly to the view's
pixels, on which loss and metrics are computed.
"""

import logging
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from iwm_fast.config.finetuning import SegmentConfig
from iwm_fast.evals.datasets import evenly_spaced, require_readable
from iwm_fast.evals.finetuning.networks import build_networks, load_model
from iwm_fast.evals.finetuning.run import (
    FinetuneContext,
    TrainedVariant,
    free_memory,
    map_validation_images,
    open_context,
    split_global_batch,
    train_job,
)
from iwm_fast.evals.finetuning.task import MAPS_ENTRY, Job
from iwm_fast.evals.finetuning.variants import (
    PREDICTOR_VARIANTS,
    Variant,
    build_variant,
    describe_origin,
    require_arms_fit,
)
from iwm_fast.evals.results import Result, save_result
from iwm_fast.evals.segmentation.figure import FigureImages, SegmentedImages, save_figure
from iwm_fast.evals.segmentation.masks import MaskReader, count_classes
from iwm_fast.evals.segmentation.mean_iou import count_pixels, mean_iou
from iwm_fast.evals.segmentation.network import classify_pixels, pixel_loss
from iwm_fast.evals.segmentation.report import make_result
from iwm_fast.models.heads import PatchHead
from iwm_fast.models.student import Student
from iwm_fast.pipelines.annotations.segmentation import masks_digest, require_masks
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)

# For each image in the figure, this many validation images are searched for ones with several classes.
_CANDIDATES = 16


@dataclass(frozen=True, kw_only=True)
class SegmentationContext:
    """Settings, data and run that all variants of a segmentation share."""

    config: SegmentConfig
    context: FinetuneContext
    model: WorldModel
    num_classes: int
    maps_digest: str
    """SHA-256 of the training maps."""

    def read_masks(self, shards: ShardSet) -> closing[MaskReader]:
        """Return a reader of the maps of these shards, as a context that closes it."""
        size, num_threads = self.context.model_config.views.size, self.config.runtime.reader_threads
        options = {"num_classes": self.num_classes, "ignore_index": self.config.ignore_index}
        return closing(MaskReader(shards, size=size, num_threads=num_threads, **options))


def evaluate_segment(
    config: SegmentConfig, rank_info: RankInfo | None = None, preemption: Preemption | None = None
) -> Result:
    """Train or resume the variants, and return and save their metrics. Collective: every rank must call it.

    Raises:
        ValueError: if the variants, run, shards or batch sizes do not fit.
        FileNotFoundError, CheckpointError: if run or shards cannot be read, or a variant has other settings.
        ShardError: if a map is missing or cannot be used, or validation maps have a class that training maps lack.
        PreemptedError: if a rank was asked to stop; calling this again resumes.
    """
    segmentation = open_segmentation(config, rank_info or single_process(config.runtime.device), preemption)
    context, samples = segmentation.context, choose_figure_samples(segmentation)
    trained, segmented = {}, {}
    for name in config.arms.split(","):
        trained[name], segmented[name] = _train_variant(name, segmentation, samples)
        free_memory(context.rank_info.device)
    result = make_result(context, segmentation.num_classes, trained)
    images = _load_figure_images(segmentation, samples)

    def save() -> None:
        save_result(config.run, result)
        title = f"{result.name}, step {result.step}: validation images, segmentation maps and predicted classes"
        save_figure(context.folder.with_name(f"{result.name}.png"), images, segmented, config.ignore_index, title)

    broadcast_from_rank_zero(save)
    return result


def open_segmentation(
    config: SegmentConfig, rank_info: RankInfo, preemption: Preemption | None = None
) -> SegmentationContext:
    """Load the run, open the shards and count the classes of their maps. Collective: every rank must call it."""
    with same_error_on_all_ranks():
        split_global_batch(config, rank_info.world_size)
        model, arms = load_model(config, rank_info), config.arms.split(",")
        if any(name in PREDICTOR_VARIANTS for name in arms):
            model.require_predictor()
        require_arms_fit(arms, config.tune, model.config.model)
        context = open_context("segment", config, model, rank_info, preemption)
        for shards in (context.train, context.val):
            require_masks(shards)
    train, val = context.train, context.val
    # The maps of both sets are compared with their images.
    broadcast_from_rank_zero(
        lambda: require_readable((train, np.arange(train.num_samples)), (val, np.arange(val.num_samples)))
    )
    options = {"ignore_index": config.ignore_index, "num_threads": config.runtime.reader_threads}
    num_classes = config.num_classes or count_classes(train, val, **options)
    digest = broadcast_from_rank_zero(lambda: masks_digest(train, config.runtime.reader_threads))
    return SegmentationContext(config=config, context=context, model=model, num_classes=num_classes, maps_digest=digest)


def choose_figure_samples(segmentation: SegmentationContext) -> Int64[np.ndarray, "samples"]:
    """Return the validation images to show, chosen among evenly spaced candidates: many classes, and different ones.

    A class counts if it covers more than a twentieth of the image. Collective: every rank must call it.
    """
    context, num_shown = segmentation.context, segmentation.config.num_shown
    candidates = evenly_spaced(context.val.num_samples, _CANDIDATES * num_shown)
    with segmentation.read_masks(context.val) as masks:

        def class_sizes(batch: Batch) -> Int64[Tensor, "B K"]:
            mask = masks.prefetch(batch)()
            return count_pixels(mask, mask, segmentation.num_classes, segmentation.config.ignore_index)[:, 2]

        sizes = map_validation_images(class_sizes, context, candidates).numpy()
    occurs = sizes > context.model_config.views.size**2 / 20
    chosen: list[int] = []
    for _ in range(min(num_shown, len(candidates))):
        # The second image with a class counts half for it, the third one a third.
        gain = (occurs / (1 + occurs[chosen].sum(axis=0))).sum(axis=1)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
    return np.sort(candidates[chosen])


def _train_variant(
    name: str, segmentation: SegmentationContext, figure_samples: Int64[np.ndarray, "samples"]
) -> tuple[TrainedVariant, SegmentedImages]:
    """Train or resume a variant and segment the validation images with it. Collective: every rank must call it."""
    context, size = segmentation.context, segmentation.context.model_config.views.size
    student = build_networks(segmentation.model, segmentation.config, context.rank_info, name)
    variant = build_variant(name, student, context, partial(PatchHead, num_classes=segmentation.num_classes))
    with segmentation.read_masks(context.train) as masks:
        stats = train_job(build_segmentation_job(variant, student, segmentation, masks), context)
    with segmentation.read_masks(context.val) as masks:

        def pixel_counts(batch: Batch) -> Int64[Tensor, "B 3 K"]:
            # Prefetching comes first, so that threads read the maps while the networks compute.
            wait = masks.prefetch(batch)
            classes = classify_pixels(variant(batch), size)
            return count_pixels(classes, wait(), segmentation.num_classes, segmentation.config.ignore_index)

        counts = map_validation_images(pixel_counts, context).numpy()
    # There are at most 256 classes, which fit into one byte for each pixel.
    classes = map_validation_images(
        lambda batch: classify_pixels(variant(batch), size).to(torch.uint8), context, figure_samples
    )
    iou = mean_iou(counts)
    log.info("%s: mean IoU %.4f, %d steps, %.0f s", name, iou, stats.steps, stats.time_s)
    segmented = SegmentedImages(classes=classes.numpy(), counts=counts[figure_samples], mean_iou=iou)
    return TrainedVariant(per_image=counts, stats=stats), segmented


def build_segmentation_job(
    variant: Variant, student: Student, segmentation: SegmentationContext, masks: MaskReader
) -> Job:
    """Return the job that trains a variant built from the student's networks; `masks` reads the training maps."""
    ignore_index = segmentation.config.ignore_index
    origin = describe_origin(segmentation.model.step, student.encoder, student.predictor)
    return variant.make_job(
        # The labels are a function that waits for the maps, so that threads read them while the networks compute.
        lambda batch: (batch.source_view, masks.prefetch(batch)),
        lambda logits, wait: pixel_loss(logits, wait(), ignore_index),
        origin
        | {
            "num_classes": segmentation.num_classes,
            "ignore_index": ignore_index,
            MAPS_ENTRY: segmentation.maps_digest,
        },
    )


def _load_figure_images(segmentation: SegmentationContext, samples: Int64[np.ndarray, "samples"]) -> FigureImages:
    normalization = segmentation.context.model_config.data.normalization
    pixels = map_validation_images(
        lambda batch: denormalize_view(batch.source_view, normalization), segmentation.context, samples
    )
    with segmentation.read_masks(segmentation.context.val) as masks:
        mask = map_validation_images(lambda batch: masks.prefetch(batch)(), segmentation.context, samples)
    return FigureImages(pixels=pixels.numpy(), mask=mask.numpy())
