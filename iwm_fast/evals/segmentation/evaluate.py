"""Regions of images: a linear classifier of patches, on the encoder's tokens or on the world model's.

Views are cut and mirrored in training, and the largest centred square in validation; maps follow. Scores of patches are
spread bilinearly over the view's pixels, where loss and measure are taken.
"""

import logging
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.config.finetuning import SegmentConfig
from iwm_fast.evals.datasets import spread
from iwm_fast.evals.finetuning.networks import networks
from iwm_fast.evals.finetuning.run import (
    FinetuneContext,
    Learnt,
    free_memory,
    micro_batches,
    open_context,
    predict,
    tune,
)
from iwm_fast.evals.finetuning.task import Job
from iwm_fast.evals.finetuning.variants import WITH_PREDICTOR, Arm, build_arm, origin_of
from iwm_fast.evals.results import Result, save_result
from iwm_fast.evals.segmentation.figure import Answer, Shown, save_picture
from iwm_fast.evals.segmentation.masks import ViewMasks, count_classes
from iwm_fast.evals.segmentation.mean_iou import mean_iou, pixel_counts
from iwm_fast.evals.segmentation.network import pixel_classes, pixel_loss
from iwm_fast.evals.segmentation.report import report
from iwm_fast.models.heads import PatchHead
from iwm_fast.models.student import Student
from iwm_fast.pipelines.annotations.segmentation import require_masks
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.preemption import Preemption
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)

# images that are looked at for each one in the picture
_CANDIDATES = 16


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What the arms of segmentation have in common."""

    config: SegmentConfig
    context: FinetuneContext
    model: WorldModel
    num_classes: int

    def masks(self, shards: ShardSet) -> closing[ViewMasks]:
        """Start to read maps for views of these samples."""
        masks = ViewMasks(
            shards,
            size=self.context.model_config.views.size,
            num_classes=self.num_classes,
            ignore_index=self.config.ignore_index,
            num_threads=self.config.runtime.reader_threads,
        )
        return closing(masks)


def evaluate_segment(
    config: SegmentConfig, rank_info: RankInfo | None = None, preemption: Preemption | None = None
) -> Result:
    """Train the arms, or go on with them, and report each one's mean IoU; draws a picture; collective.

    Raises:
        ValueError: if arms, run, shards or sizes of batches do not fit.
        FileNotFoundError, CheckpointError: if run or shards cannot be read, or an arm was trained with other settings.
        ShardError: if a sample has no map, one that cannot be used, or a validation map a class of no training map.
        PreemptedError: if a rank was told to stop; the same call goes on.
    """
    bench = open_bench(config, rank_info or single_process(config.runtime.device), preemption)
    context, chosen = bench.context, choose_shown(bench)
    learnt, answers = {}, {}
    for name in config.arms.split(","):
        learnt[name], answers[name] = _learn(name, bench, chosen)
        free_memory(context.rank_info.device)
    result = report(context, bench.num_classes, learnt)
    shown = _show(bench, chosen)

    def save() -> None:
        save_result(config.run, result)
        title = f"{result.name}, step {result.step}: validation images, their maps, and what each arm finds"
        save_picture(context.folder.with_name(f"{result.name}.png"), shown, answers, config.ignore_index, title)

    broadcast_from_rank_zero(save)
    return result


def open_bench(config: SegmentConfig, rank_info: RankInfo, preemption: Preemption | None = None) -> Bench:
    """Load the run, open the shards and count the classes of their maps; collective."""
    with same_error_on_all_ranks():
        micro_batches(config, rank_info.world_size)
        model = world_model.load(config.run, rank_info.device, checkpoint=config.checkpoint)
        if any(arm in WITH_PREDICTOR for arm in config.arms.split(",")):
            model.require_predictor()
        context = open_context("segment", config, model, rank_info, preemption)
        for shards in (context.train, context.val):
            require_masks(shards)
    scan = {"ignore_index": config.ignore_index, "num_threads": config.runtime.reader_threads}
    num_classes = config.num_classes or count_classes(context.train, context.val, **scan)
    return Bench(config=config, context=context, model=model, num_classes=num_classes)


def choose_shown(bench: Bench) -> Int64[np.ndarray, "samples"]:
    """Choose validation images for the picture, those with most classes of some at equal distances; collective.

    What covers less than a twentieth of an image is not counted.
    """
    context, num_shown = bench.context, bench.config.num_shown
    candidates = spread(context.val.num_samples, _CANDIDATES * num_shown)
    with bench.masks(context.val) as masks:

        def sizes(batch: Batch) -> Int64[Tensor, "B K"]:
            mask = masks.begin(batch)()
            return pixel_counts(mask, mask, bench.num_classes, bench.config.ignore_index)[:, 2]

        pixels = predict(sizes, context, candidates).numpy()
    num_seen = (pixels > context.model_config.views.size**2 / 20).sum(axis=1)
    order = np.argsort(-num_seen, kind="stable")
    return np.sort(candidates[order[:num_shown]])


def _learn(name: str, bench: Bench, chosen: Int64[np.ndarray, "samples"]) -> tuple[Learnt, Answer]:
    """Train an arm, or go on with it, and ask it about the validation images; collective."""
    context, size = bench.context, bench.context.model_config.views.size
    student = networks(bench.model, bench.config, context.rank_info, name)
    arm = build_arm(name, student, context, partial(PatchHead, num_classes=bench.num_classes))
    with bench.masks(context.train) as masks:
        tuned = tune(segmentation_job(arm, student, bench, masks), context)
    with bench.masks(context.val) as masks:

        def found(batch: Batch) -> Int64[Tensor, "B 3 K"]:
            # first: threads read while networks compute
            wait = masks.begin(batch)
            classes = pixel_classes(arm(batch), size)
            return pixel_counts(classes, wait(), bench.num_classes, bench.config.ignore_index)

        counts = predict(found, context).numpy()
    painted = predict(lambda batch: pixel_classes(arm(batch), size).to(torch.uint8), context, chosen).numpy()
    measured = mean_iou(counts)
    log.info("%s: mean IoU %.4f, %d steps, %.0f s", name, measured, tuned.steps, tuned.time_s)
    answer = Answer(classes=painted, counts=counts[chosen], mean_iou=measured)
    return Learnt(measured=counts, tuned=tuned), answer


def segmentation_job(arm: Arm, student: Student, bench: Bench, masks: ViewMasks) -> Job:
    """Return what is to be trained of an arm that begins with the student's networks; `masks` reads its maps."""
    ignore_index = bench.config.ignore_index
    origin = origin_of(bench.model.step, student.encoder, student.predictor)
    return arm.job(
        # threads read the maps while networks compute
        lambda batch: (batch.source_view, masks.begin(batch)),
        lambda scores, wait_for_masks: pixel_loss(scores, wait_for_masks(), ignore_index),
        origin | {"num_classes": bench.num_classes, "ignore_index": ignore_index},
    )


def _show(bench: Bench, chosen: Int64[np.ndarray, "samples"]) -> Shown:
    pixels = predict(lambda batch: denormalize_view(batch.source_view), bench.context, chosen)
    with bench.masks(bench.context.val) as masks:
        mask = predict(lambda batch: masks.begin(batch)(), bench.context, chosen)
    return Shown(pixels=pixels.numpy(), mask=mask.numpy())
