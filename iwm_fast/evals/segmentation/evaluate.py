"""Regions of images: a linear classifier of patches, on the encoder's tokens or on the world model's.

Views are cut and mirrored in training, and the largest centred square in validation; maps follow. Scores of patches are
spread bilinearly over the view's pixels, where loss and measure are taken.
"""

import gc
import logging

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.config.finetuning import SegmentConfig
from iwm_fast.evals.datasets import spread, training_shards, validation_shards
from iwm_fast.evals.finetuning.run import micro_batches, predict, run_config, task_folder, tune
from iwm_fast.evals.finetuning.variants import WITH_PREDICTOR
from iwm_fast.evals.results import Result, save_result
from iwm_fast.evals.segmentation.figure import Answer, Shown, save_picture
from iwm_fast.evals.segmentation.masks import count_classes
from iwm_fast.evals.segmentation.mean_iou import mean_iou, pixel_counts
from iwm_fast.evals.segmentation.network import pixel_classes
from iwm_fast.evals.segmentation.report import Learnt, report
from iwm_fast.evals.segmentation.variants import Bench, build_arm
from iwm_fast.pipelines.annotations.segmentation import require_masks
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.runtime.preemption import Preemption

log = logging.getLogger(__name__)

# images that are looked at for each one in the picture
_CANDIDATES = 16


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
    bench = _open(config, rank_info or single_process(config.runtime.device), preemption)
    chosen = choose_shown(bench)
    learnt, answers = {}, {}
    for name in config.arms.split(","):
        learnt[name], answers[name] = _learn(name, bench, chosen)
        gc.collect()
    result = report(config, bench.model.step, bench.num_classes, learnt)
    shown = _show(bench, chosen)

    def save() -> None:
        save_result(config.run, result)
        title = f"{result.name}, step {result.step}: validation images, their maps, and what each arm finds"
        save_picture(bench.folder.with_name(f"{result.name}.png"), shown, answers, config.ignore_index, title)

    broadcast_from_rank_zero(save)
    return result


def _open(config: SegmentConfig, rank_info: RankInfo, preemption: Preemption | None = None) -> Bench:
    with same_error_on_all_ranks():
        micro_batches(config, rank_info.world_size)
        model = world_model.load(config.run, rank_info.device)
        if any(arm in WITH_PREDICTOR for arm in config.arms.split(",")):
            model.require_predictor()
        train, val = training_shards(model, config.data), validation_shards(model, config.data)
        for shards in (train, val):
            require_masks(shards)
    scan = {"ignore_index": config.ignore_index, "num_threads": config.runtime.reader_threads}
    num_classes = config.num_classes or count_classes(train, val, **scan)
    settings = run_config(config, model.config, task_folder(config.run, "segment", config.name))
    return Bench(
        config=config,
        settings=settings,
        model=model,
        rank_info=rank_info,
        preemption=preemption,
        train=train,
        val=val,
        num_classes=num_classes,
    )


def choose_shown(bench: Bench) -> Int64[np.ndarray, "samples"]:
    """Choose validation images for the picture, those with most classes of some at equal distances; collective.

    What covers less than a twentieth of an image is not counted.
    """
    candidates = spread(bench.val.num_samples, _CANDIDATES * bench.config.num_shown)
    with bench.masks(bench.val) as masks:

        def sizes(batch: Batch) -> Int64[Tensor, "B K"]:
            mask = masks.begin(batch)()
            return pixel_counts(mask, mask, bench.num_classes, bench.config.ignore_index)[:, 2]

        pixels = predict(sizes, bench.settings, bench.val, candidates, bench.rank_info).numpy()
    num_seen = (pixels > bench.settings.views.size**2 / 20).sum(axis=1)
    order = np.argsort(-num_seen, kind="stable")
    return np.sort(candidates[order[: bench.config.num_shown]])


def _learn(name: str, bench: Bench, chosen: Int64[np.ndarray, "samples"]) -> tuple[Learnt, Answer]:
    """Train an arm, or go on with it, and ask it about the validation images; collective."""
    config, settings, rank_info = bench.config, bench.settings, bench.rank_info
    arm, size = build_arm(name, bench), settings.views.size
    with bench.masks(bench.train) as masks:
        job = arm.job(bench, masks)
        tuned = tune(
            job,
            config,
            model_config=bench.model.config,
            shards=bench.train,
            rank_info=rank_info,
            folder=bench.folder,
            preemption=bench.preemption,
        )
    with bench.masks(bench.val) as masks:

        def found(batch: Batch) -> Int64[Tensor, "B 3 K"]:
            inputs = arm.inputs(batch, masks)
            classes = pixel_classes(arm.parts.module(inputs), size)
            return pixel_counts(classes, inputs.wait_for_masks(), bench.num_classes, config.ignore_index)

        def painted(batch: Batch) -> UInt8[Tensor, "B H W"]:
            return pixel_classes(arm.parts.module(arm.inputs(batch, masks)), size).to(torch.uint8)

        counts = predict(found, settings, bench.val, np.arange(bench.val.num_samples), rank_info).numpy()
        classes = predict(painted, settings, bench.val, chosen, rank_info).numpy()
    measured = mean_iou(counts)
    log.info("%s: mean IoU %.4f, %d steps, %.0f s", name, measured, tuned.steps, tuned.time_s)
    return Learnt(counts=counts, tuned=tuned), Answer(classes=classes, counts=counts[chosen], mean_iou=measured)


def _show(bench: Bench, chosen: Int64[np.ndarray, "samples"]) -> Shown:
    with bench.masks(bench.val) as masks:
        given = bench.settings, bench.val, chosen, bench.rank_info
        pixels = predict(lambda batch: denormalize_view(batch.source_view), *given)
        mask = predict(lambda batch: masks.begin(batch)(), *given)
    return Shown(pixels=pixels.numpy(), mask=mask.numpy())
