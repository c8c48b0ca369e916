"""What the arms of segmentation have learnt, as rows beside each other."""

from typing import Any

import numpy as np
from jaxtyping import Float64, Int64

from iwm_fast.evals.finetuning.run import FinetuneContext, Learnt
from iwm_fast.evals.results import Result, Row
from iwm_fast.evals.segmentation.mean_iou import (
    class_iou,
    guessed,
    interval,
    mean_iou,
    pixel_accuracy,
    resampled_mean_iou,
)
from iwm_fast.training.train_state import TrainStats

CONTROLS = {"predictor": "random_predictor", "head": "untrained_head"}
"""What an arm has to beat, where that was trained, too."""


def report(context: FinetuneContext, num_classes: int, learnt: dict[str, Learnt]) -> Result:
    """Return rows of mean IoU, then of pixel accuracy.

    Args:
        context: what all arms were trained with.
        num_classes: classes of the maps.
        learnt: by arm; `measured` are its numbers of pixels, see `iwm_fast.evals.segmentation.mean_iou.pixel_counts`.

    Raises:
        ValueError: if no pixel of the validation maps counts.
    """
    counts = {arm: one.measured for arm, one in learnt.items()}
    draws = {arm: resampled_mean_iou(one, context.task.seed) for arm, one in counts.items()}
    rows = [_row(arm, "mean_iou", counts, one.tuned, draws[arm]) for arm, one in learnt.items()]
    rows += [_row(arm, "pixel_accuracy", counts, one.tuned) for arm, one in learnt.items()]
    some = next(iter(counts.values()))
    details: dict[str, Any] = {
        "num_classes": num_classes,
        "pixels_of_each_class": some[:, 2].sum(axis=0).tolist(),
        "iou_of_each_class": {arm: class_iou(one) for arm, one in counts.items()},
        "steps": {arm: one.tuned.steps for arm, one in learnt.items()},
    }
    if {"predictor", "random_predictor"} <= learnt.keys():
        # on the same images: their differences vary less than two means
        low, high = interval(draws["predictor"] - draws["random_predictor"])
        gain = mean_iou(counts["predictor"]) - mean_iou(counts["random_predictor"])
        details["gain_of_pretraining"] = {"mean_iou": gain, "low": low, "high": high}
    return context.result("segment", rows, details)


def _row(
    arm: str,
    metric: str,
    counts: dict[str, Int64[np.ndarray, "images 3 K"]],
    tuned: TrainStats,
    draws: Float64[np.ndarray, "draws"] | None = None,
) -> Row:
    measure = {"mean_iou": mean_iou, "pixel_accuracy": pixel_accuracy}[metric]
    low, high = (None, None) if draws is None else interval(draws)
    control = CONTROLS.get(arm, "")
    has_control = control in counts
    return Row(
        subject=arm,
        metric=metric,
        value=measure(counts[arm]),
        low=low,
        high=high,
        control=measure(counts[control]) if has_control else None,
        control_name=control if has_control else "",
        chance=measure(guessed(counts[arm])),
        num_samples=len(counts[arm]),
        **tuned.columns(),
    )
