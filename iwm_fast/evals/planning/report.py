"""The numbers of an evaluation of planning: errors in natural units, beside what is to be beaten."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float32

from iwm_fast.config.run import RunConfig
from iwm_fast.evals.planning.cem import FLAGS
from iwm_fast.evals.planning.image_pairs import Kind
from iwm_fast.evals.results import Row, bootstrap
from iwm_fast.pipelines.transforms.action import action_difference


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was done to images, and what is said to have been done; actions in the units that the predictor is told."""

    done: Float32[np.ndarray, "images A"]
    found: Float32[np.ndarray, "images A"]
    """By the search."""
    untrained: Float32[np.ndarray, "images A"]
    """By the same search through an untrained predictor."""
    regressed: Float32[np.ndarray, "images A"]
    """By ridge regression on frozen features."""
    distance: Float32[np.ndarray, "images 3"]
    """From the target's tokens to the prediction for what was found, for what was done, and for no change."""
    has_colour: Float32[np.ndarray, "images"]
    """1 if the photograph has any, otherwise 0."""

    def __len__(self) -> int:
        return len(self.done)


def new_outcome(num_images: int, num_actions: int) -> Outcome:
    """Return zeros to be overwritten."""
    actions = [np.zeros((num_images, num_actions), np.float32) for _ in range(4)]
    names = ("done", "found", "untrained", "regressed")
    return Outcome(
        **dict(zip(names, actions, strict=True)),
        distance=np.zeros((num_images, 3), np.float32),
        has_colour=np.zeros(num_images, np.float32),
    )


def parameter_rows(outcome: Outcome, entries: Sequence[str], config: RunConfig, seed: int) -> list[Row]:
    """Return for each entry what search, regression and doing nothing miss by.

    That is the mean absolute difference in natural units for jitter, the share of wrong answers for flags. Where some
    photographs have no colour, saturation and hue have a further row for those that have.
    """
    has_colour = outcome.has_colour > 0
    rows = []
    for name in entries:
        rows += _rows_of(outcome, name, config, seed)
        if name in ("saturation", "hue") and 0 < has_colour.sum() < len(outcome):
            rows.append(_search_row(outcome, name, config, seed, is_counted=has_colour))
    if {"saturation", "hue"} & set(entries):
        share = float(1 - has_colour.mean())
        rows.append(Row(subject="photographs", metric="share_without_colour", value=share, num_samples=len(outcome)))
    return rows


def _rows_of(outcome: Outcome, name: str, config: RunConfig, seed: int) -> list[Row]:
    everything = np.ones(len(outcome), bool)
    metric = "wrong" if name in FLAGS else "error"
    rows = [_search_row(outcome, name, config, seed, is_counted=everything)]
    num_tuned = 3 * config.model.encoder.dim + 1
    for answer, words, tuned in ((outcome.regressed, "regression", num_tuned), (0 * outcome.done, "no_change", 0)):
        missed = _missed(outcome, answer, name, config)
        low, high = bootstrap(missed, seed)
        rows.append(
            Row(subject=name, metric=f"{metric}_of_{words}", value=float(missed.mean()), low=low, high=high,
                num_tuned=tuned, num_samples=len(outcome))
        )  # fmt: skip
    return rows


def _search_row(
    outcome: Outcome, name: str, config: RunConfig, seed: int, *, is_counted: Bool[np.ndarray, "images"]
) -> Row:
    missed, untrained, guessed = (
        missed[is_counted]
        for missed in (
            _missed(outcome, outcome.found, name, config),
            _missed(outcome, outcome.untrained, name, config),
            _missed_by_guess(outcome, name, config),
        )
    )
    low, high = bootstrap(missed, seed)
    metric = "wrong" if name in FLAGS else "error"
    return Row(
        subject=name, metric=metric if is_counted.all() else f"{metric}_with_colour", value=float(missed.mean()),
        low=low, high=high, control=float(untrained.mean()), control_name="untrained predictor",
        chance=float(guessed.mean()), num_samples=int(is_counted.sum()),
    )  # fmt: skip


def _missed(
    outcome: Outcome, answer: Float[np.ndarray, "images A"], name: str, config: RunConfig
) -> Float[np.ndarray, "images"]:
    done, said = (action_difference(action, config.views)[name] for action in (outcome.done, answer))
    if name in FLAGS:
        return ((said > 0.5) != (done > 0.5)).astype(np.float64)
    return np.abs(said - done).astype(np.float64)


def _missed_by_guess(outcome: Outcome, name: str, config: RunConfig) -> Float[np.ndarray, "images"]:
    """Return what a fresh draw from the range of what was drawn misses on average, image by image."""
    if name in FLAGS:
        return np.full(len(outcome), 0.5)
    done, strength = action_difference(outcome.done, config.views)[name].astype(np.float64), getattr(config.views, name)
    return (strength**2 + done**2) / (2 * strength)


def distance_rows(outcome: Outcome, kind: Kind, seed: int) -> list[Row]:
    """Return how near the predictions come: for the action found, for the true one, and for no change."""
    rows = []
    for column, metric in enumerate(("distance_found", "distance_of_true_action", "distance_of_no_change")):
        values = outcome.distance[:, column].astype(np.float64)
        low, high = bootstrap(values, seed)
        rows.append(
            Row(subject=f"{kind} sources", metric=metric, value=float(values.mean()), low=low, high=high,
                num_samples=len(outcome))
        )  # fmt: skip
    return rows
