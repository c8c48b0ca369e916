"""Rows of the planning evaluation: errors in natural units, beside those of the baselines."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32

from iwm_fast.config.run import RunConfig
from iwm_fast.evals.planning.image_pairs import SourceKind
from iwm_fast.evals.results import Row, mean_row
from iwm_fast.pipelines.transforms.action import action_vector, change_from_action
from iwm_fast.pipelines.transforms.composition import identity_parameters
from iwm_fast.rendering.charts import RecoveryPlot


@dataclass(frozen=True, kw_only=True)
class PlanningErrors:
    """True and estimated actions of image pairs, in units of the predictor, with the distances of their predictions."""

    true: Float32[np.ndarray, "images A"]
    searched: Float32[np.ndarray, "images A"]
    """Found by the search."""
    untrained: Float32[np.ndarray, "images A"]
    """Found by the same search with an untrained predictor."""
    regressed: Float32[np.ndarray, "images A"]
    """Estimated by ridge regression from frozen features."""
    distance: Float32[np.ndarray, "images 3"]
    """Distances of the predictions for the searched action, the true one, and no change to the target's tokens."""
    has_colour: Float32[np.ndarray, "images"]
    """1 if the photograph has colours, otherwise 0."""

    def __len__(self) -> int:
        return len(self.true)


def parameter_rows(errors: PlanningErrors, entries: Sequence[str], config: RunConfig, seed: int) -> list[Row]:
    """Return the errors of search, regression and no change for each entry of the action.

    The error of a number is the mean absolute difference in natural units, that of a flag the share of wrong answers.
    If some photographs have no colour, entries that need colours get a further row for those that have.
    """
    has_colour, num_tuned = errors.has_colour > 0, 3 * config.model.encoder.dim + 1
    rows, described = [], [config.views.all_entries[name] for name in entries]
    for name, entry in zip(entries, described, strict=True):
        metric = "wrong" if entry.is_flag else "error"
        rows += [
            _search_row(errors, name, metric, config, seed),
            mean_row(name, f"{metric}_of_regression", _error(errors, errors.regressed, name, config), seed,
                     num_tuned=num_tuned),
            mean_row(name, f"{metric}_of_no_change", _error(errors, 0 * errors.true, name, config), seed),
        ]  # fmt: skip
        if entry.needs_color and 0 < has_colour.sum() < len(errors):
            coloured = PlanningErrors(**{field: values[has_colour] for field, values in vars(errors).items()})
            rows.append(_search_row(coloured, name, f"{metric}_with_colour", config, seed))
    if any(entry.needs_color for entry in described):
        share = float(1 - has_colour.mean())
        rows.append(Row(subject="photographs", metric="share_without_colour", value=share, num_samples=len(errors)))
    return rows


def _search_row(errors: PlanningErrors, name: str, metric: str, config: RunConfig, seed: int) -> Row:
    return mean_row(
        name, metric, _error(errors, errors.searched, name, config), seed,
        control=_error(errors, errors.untrained, name, config), control_name="untrained predictor",
        chance=float(_error_of_guess(errors, name, config).mean()),
    )  # fmt: skip


def _error(
    errors: PlanningErrors, estimate: Float[np.ndarray, "images A"], name: str, config: RunConfig
) -> Float[np.ndarray, "images"]:
    true, estimated = (change_from_action(action, config.views)[name] for action in (errors.true, estimate))
    if config.views.all_entries[name].is_flag:
        return ((estimated > 0.5) != (true > 0.5)).astype(np.float64)
    return np.abs(estimated - true).astype(np.float64)


def _error_of_guess(errors: PlanningErrors, name: str, config: RunConfig) -> Float[np.ndarray, "images"]:
    """Return the expected error, for each image, of guessing from the distribution the true change was drawn from."""
    entry = config.views.all_entries[name]
    if entry.is_flag:
        return np.full(len(errors), 0.5)
    # Changes from an unchanged image that are equally likely: the parameter is uniform about its neutral value.
    neutral = identity_parameters(config.views, 1000)
    values = entry.neutral + entry.strength * np.linspace(-0.999, 0.999, 1000)
    guesses = action_vector(neutral, neutral | {name: values}, config.views)
    guess, true = (
        change_from_action(action, config.views)[name].astype(np.float64) for action in (guesses, errors.true)
    )
    return np.abs(guess - true[:, None]).mean(axis=1)


def recovery_plots(errors: PlanningErrors, entries: Sequence[str], config: RunConfig) -> list[RecoveryPlot]:
    """Return a plot of the true change against those of search and regression for each number of the action.

    Photographs without colour are left out where an entry needs colours.
    """
    plots = []
    for name in entries:
        entry = config.views.all_entries[name]
        shown = (errors.has_colour > 0) | (not entry.needs_color)
        true, searched, regressed = (
            change_from_action(action[shown], config.views)[name]
            for action in (errors.true, errors.searched, errors.regressed)
        )
        if entry.is_flag or not len(true):
            continue
        series = {"search": searched, "regression": regressed}
        texts = [f"{label} {np.abs(values - true).mean():.3f}" for label, values in series.items()]
        ends = np.concatenate([true, searched, regressed])
        plots.append(
            RecoveryPlot(
                title=name.capitalize(),
                note=f"{len(true)} images; mean error: {'; '.join(texts)}; no change {np.abs(true).mean():.3f}",
                limits=(float(ends.min()), float(ends.max())),
                no_change=0.0,
                x_label="true change",
                asked=true,
                recovered=series,
            )
        )
    return plots


def distance_rows(errors: PlanningErrors, kind: SourceKind, seed: int) -> list[Row]:
    """Return the distances of the predictions for the searched action, the true one, and no change to the target."""
    metrics = ("distance_found", "distance_of_true_action", "distance_of_no_change")
    columns = zip(metrics, errors.distance.T.astype(np.float64), strict=True)
    return [mean_row(f"{kind} sources", metric, values, seed) for metric, values in columns]
