"""The numbers of an evaluation of planning: errors in natural units, beside what is to be beaten."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from iwm_fast.config.run import RunConfig
from iwm_fast.evals.planning.cem import FLAGS
from iwm_fast.evals.planning.image_pairs import Kind
from iwm_fast.evals.results import Row, mean_row
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


def parameter_rows(outcome: Outcome, entries: Sequence[str], config: RunConfig, seed: int) -> list[Row]:
    """Return for each entry what search, regression and doing nothing miss by.

    That is the mean absolute difference in natural units for jitter, the share of wrong answers for flags. Where some
    photographs have no colour, saturation and hue have a further row for those that have.
    """
    has_colour, num_tuned = outcome.has_colour > 0, 3 * config.model.encoder.dim + 1
    rows = []
    for name in entries:
        metric = "wrong" if name in FLAGS else "error"
        rows += [
            _search_row(outcome, name, metric, config, seed),
            mean_row(name, f"{metric}_of_regression", _missed(outcome, outcome.regressed, name, config), seed,
                     num_tuned=num_tuned),
            mean_row(name, f"{metric}_of_no_change", _missed(outcome, 0 * outcome.done, name, config), seed),
        ]  # fmt: skip
        if name in ("saturation", "hue") and 0 < has_colour.sum() < len(outcome):
            coloured = Outcome(**{part: values[has_colour] for part, values in vars(outcome).items()})
            rows.append(_search_row(coloured, name, f"{metric}_with_colour", config, seed))
    if {"saturation", "hue"} & set(entries):
        share = float(1 - has_colour.mean())
        rows.append(Row(subject="photographs", metric="share_without_colour", value=share, num_samples=len(outcome)))
    return rows


def _search_row(outcome: Outcome, name: str, metric: str, config: RunConfig, seed: int) -> Row:
    return mean_row(
        name,
        metric,
        _missed(outcome, outcome.found, name, config),
        seed,
        control=_missed(outcome, outcome.untrained, name, config),
        control_name="untrained predictor",
        chance=float(_missed_by_guess(outcome, name, config).mean()),
    )


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
    metrics = ("distance_found", "distance_of_true_action", "distance_of_no_change")
    columns = zip(metrics, outcome.distance.T.astype(np.float64), strict=True)
    return [mean_row(f"{kind} sources", metric, values, seed) for metric, values in columns]
