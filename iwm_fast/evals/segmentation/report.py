"""Result of a segmentation: mean IoU and pixel accuracy of each variant."""

from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from iwm_fast.evals.finetuning.run import FinetuneContext, TrainedVariant
from iwm_fast.evals.results import Result, Row
from iwm_fast.evals.segmentation.mean_iou import (
    class_iou,
    majority_baseline,
    mean_iou,
    percentile_interval,
    pixel_accuracy,
    resampled_mean_iou,
)
from iwm_fast.training.train_state import TrainStats

CONTROLS = {"predictor": "random_predictor", "head": "untrained_head"}
"""The variant that serves as control of another variant, if it was trained, too."""


def make_result(context: FinetuneContext, num_classes: int, trained: dict[str, TrainedVariant]) -> Result:
    """Return rows of mean IoU, then rows of pixel accuracy; `per_image` of a variant holds its pixel counts.

    Raises:
        ValueError: if all pixels of the validation maps are ignored.
    """
    counts = {name: variant.per_image for name, variant in trained.items()}
    draws = {name: resampled_mean_iou(variant_counts, context.settings.seed) for name, variant_counts in counts.items()}
    rows = [_row(name, "mean_iou", counts, variant.stats, draws[name]) for name, variant in trained.items()]
    rows += [_row(name, "pixel_accuracy", counts, variant.stats) for name, variant in trained.items()]
    # True pixels are the same for all variants.
    true_pixels = next(iter(counts.values()))[:, 2]
    details: dict[str, Any] = {
        "num_classes": num_classes,
        "pixels_of_each_class": true_pixels.sum(axis=0).tolist(),
        "iou_of_each_class": {name: class_iou(variant_counts) for name, variant_counts in counts.items()},
        "steps": {name: variant.stats.steps for name, variant in trained.items()},
    }
    if {"predictor", "random_predictor"} <= trained.keys():
        # Draws are paired: a difference on the same images varies less than the difference of two independent means.
        gain = mean_iou(counts["predictor"]) - mean_iou(counts["random_predictor"])
        low, high = percentile_interval(draws["predictor"] - draws["random_predictor"], gain)
        details["gain_of_pretraining"] = {"mean_iou": gain, "low": low, "high": high}
    return context.make_result("segment", rows, details)


def _row(
    name: str,
    metric: str,
    counts: dict[str, Int64[np.ndarray, "images 3 K"]],
    stats: TrainStats,
    draws: Float64[np.ndarray, "draws"] | None = None,
) -> Row:
    measure = {"mean_iou": mean_iou, "pixel_accuracy": pixel_accuracy}[metric]
    value = measure(counts[name])
    low, high = (None, None) if draws is None else percentile_interval(draws, value)
    control = CONTROLS.get(name, "")
    has_control = control in counts
    return Row(
        subject=name,
        metric=metric,
        value=value,
        low=low,
        high=high,
        control=measure(counts[control]) if has_control else None,
        control_name=control if has_control else "",
        chance=measure(majority_baseline(counts[name])),
        num_samples=len(counts[name]),
        **stats.columns(),
    )
