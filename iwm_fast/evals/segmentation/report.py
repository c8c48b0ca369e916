"""What the arms of segmentation have learnt, as rows beside each other."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Int64

from iwm_fast.config.finetuning import SegmentConfig
from iwm_fast.evals.finetuning.run import task_folder
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


@dataclass(frozen=True, kw_only=True)
class Learnt:
    """What an arm has come to."""

    counts: Int64[np.ndarray, "images 3 K"]
    """Of each validation image; see `iwm_fast.evals.segmentation.mean_iou.pixel_counts`."""
    tuned: TrainStats


def report(config: SegmentConfig, step: int, num_classes: int, learnt: dict[str, Learnt]) -> Result:
    """Return rows of mean IoU, then of pixel accuracy.

    Args:
        config: settings.
        step: of the run's checkpoint.
        num_classes: classes of the maps.
        learnt: by arm.

    Raises:
        ValueError: if no pixel of the validation maps counts.
    """
    draws = {arm: resampled_mean_iou(one.counts, config.seed) for arm, one in learnt.items()}
    rows = [_row(arm, "mean_iou", learnt, draws[arm]) for arm in learnt]
    rows += [_row(arm, "pixel_accuracy", learnt) for arm in learnt]
    some = next(iter(learnt.values()))
    details: dict[str, Any] = {
        "num_classes": num_classes,
        "pixels_of_each_class": some.counts[:, 2].sum(axis=0).tolist(),
        "iou_of_each_class": {arm: class_iou(one.counts) for arm, one in learnt.items()},
        "steps": {arm: one.tuned.steps for arm, one in learnt.items()},
    }
    if {"predictor", "random_predictor"} <= learnt.keys():
        # on the same images: their differences vary less than two means
        low, high = interval(draws["predictor"] - draws["random_predictor"])
        gain = mean_iou(learnt["predictor"].counts) - mean_iou(learnt["random_predictor"].counts)
        details["gain_of_pretraining"] = {"mean_iou": gain, "low": low, "high": high}
    return Result(
        task="segment",
        name=task_folder(config.run, "segment", config.name).name,
        rows=tuple(rows),
        step=step,
        seed=config.seed,
        settings=asdict(config),
        details=details,
    )


def _row(arm: str, metric: str, learnt: dict[str, Learnt], draws: np.ndarray | None = None) -> Row:
    measure = {"mean_iou": mean_iou, "pixel_accuracy": pixel_accuracy}[metric]
    counts, tuned, control = learnt[arm].counts, learnt[arm].tuned, CONTROLS.get(arm, "")
    low, high = (None, None) if draws is None else interval(draws)
    has_control = control in learnt
    return Row(
        subject=arm,
        metric=metric,
        value=measure(counts),
        low=low,
        high=high,
        control=measure(learnt[control].counts) if has_control else None,
        control_name=control if has_control else "",
        chance=measure(guessed(counts)),
        num_samples=len(counts),
        **tuned.columns(),
    )
