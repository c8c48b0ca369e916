"""The action: the vector that describes the change from source to target view to the predictor, and its inverse."""

import numpy as np
from jaxtyping import Float32

from iwm_fast.pipelines.transforms.base import Parameters
from iwm_fast.pipelines.transforms.composition import ViewConfig


def action_vector(
    source: Parameters, target: Parameters, views: ViewConfig, geometry: Parameters | None = None
) -> Float32[np.ndarray, "B A"]:
    """Return the action of B pairs of views, with the entries and order of `views.entries`; zero means no change.

    `geometry` is the result of `source_geometry`, or None if both views show the same region. The photometric entries
    follow the paper; the scaling to order one and the crop entries are ours.
    """
    change: Parameters = {}
    for transformation in views.transformations:
        change |= transformation.change(source | (geometry or {}), target)
    entries = views.all_entries
    columns = [change[name].astype(np.float32) / entries[name].scale for name in views.entries]
    return np.stack(columns, axis=1).astype(np.float32)


def change_from_action(action: Float32[np.ndarray, "B A"], views: ViewConfig) -> Parameters:
    """Return the entries of actions by name, in natural units: factors or their logarithms, turns, fractions, flags.

    This inverts the scaling of `action_vector`.
    """
    entries = views.all_entries
    return {name: action[:, column] * entries[name].scale for column, name in enumerate(views.entries)}


def action_from_change(change: dict[str, float], views: ViewConfig) -> Float32[np.ndarray, "1 A"]:
    """Return the action of a change in natural units; entries that it does not name are 0."""
    entries = views.all_entries
    return np.array([[change.get(name, 0.0) / entries[name].scale for name in views.entries]], np.float32)


def describe_action(action: Float32[np.ndarray, "A"], views: ViewConfig) -> str:
    """Return an English description of the change that an action asks for, for figures and logs."""
    change = {name: float(value) for name, (value,) in change_from_action(action[None], views).items()}
    order = (*views.operations, views.flip, views.crop)
    phrases = [phrase for transformation in order for phrase in transformation.describe(change)]
    return ", ".join(phrases) or "no change"
