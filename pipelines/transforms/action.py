"""The action: the vector that describes the change from source to target view to the predictor, and its inverse."""

import math

import numpy as np
from jaxtyping import Float32

from iwm_fast.pipelines.config import CROP_ENTRIES, FLIP_ENTRY, ViewConfig
from iwm_fast.pipelines.transforms.parameters import JITTER, Photometry


def _entry_scale(config: ViewConfig, name: str) -> float:
    """Return the divisor that makes an entry of order one."""
    if name in JITTER:
        # With a strength of 0 the difference is always 0, and any divisor will do.
        return getattr(config, name) or 1.0
    if name in CROP_ENTRIES and config.source_crop is not None:
        # The largest offset of the centre and the largest logarithm of a side occur for the smallest crop.
        min_side = config.source_crop[0] ** 0.5
        return ((1 - min_side) / 2 if name in ("crop_x", "crop_y") else -math.log(min_side)) or 1.0
    return 1.0


def action_vector(
    source: Photometry,
    target: Photometry,
    config: ViewConfig,
    geometry: Float32[np.ndarray, "B 5"] | None = None,
) -> Float32[np.ndarray, "B A"]:
    """Return the action of B pairs of views, with the entries and order of `config.entries`; zero means no change.

    A jitter entry is target minus source, divided by the jitter's strength; blur, grayscale and solarize are the flags
    of the source. `geometry` is the result of `source_geometry`, or None if both views show the same region.
    The photometric entries follow section 3 of the paper; the scaling to order one and the crop entries are ours.
    """
    if geometry is None:
        geometry = np.zeros((len(source), 5), np.float32)
    geometry_entries = dict(zip((*CROP_ENTRIES, FLIP_ENTRY), geometry.T, strict=True))
    columns = []
    for name in config.entries:
        if name in JITTER:
            columns.append((getattr(target, name) - getattr(source, name)) / _entry_scale(config, name))
        elif name in geometry_entries:
            columns.append(geometry_entries[name] / _entry_scale(config, name))
        else:
            columns.append(getattr(source, name).astype(np.float32))
    return np.stack(columns, axis=1).astype(np.float32)


def change_from_action(action: Float32[np.ndarray, "B A"], config: ViewConfig) -> dict[str, np.ndarray]:
    """Return the entries of actions by name, in natural units: factors, turns, fractions and flags.

    This inverts the scaling of `action_vector`.
    """
    return {name: action[:, column] * _entry_scale(config, name) for column, name in enumerate(config.entries)}


def action_from_change(change: dict[str, float], config: ViewConfig) -> Float32[np.ndarray, "1 A"]:
    """Return the action of a change in natural units; entries that it does not name are 0."""
    row = [change.get(name, 0.0) / _entry_scale(config, name) for name in config.entries]
    return np.array([row], np.float32)


def describe_action(action: Float32[np.ndarray, "A"], config: ViewConfig) -> str:
    """Return an English description of the change that an action asks for, for figures and logs."""
    change = {name: float(value) for name, (value,) in change_from_action(action[None], config).items()}
    # Changes below 0.005 would be displayed as 0.00.
    phrases = [_describe_jitter(name, change[name]) for name in JITTER if abs(change.get(name, 0)) > 5e-3]
    # The flags say what was done to the source, so the change to the target is the opposite.
    undo = {"blur": "sharpen", "grayscale": "colour", "solarize": "undo solarize", FLIP_ENTRY: "mirror"}
    phrases += [phrase for name, phrase in undo.items() if change.get(name, 0) > 0.5]
    if any(abs(change.get(name, 0)) > 5e-3 for name in CROP_ENTRIES):
        x, y, width, height = (change.get(name, 0.0) for name in CROP_ENTRIES)
        phrases.append(f"from a crop of {math.exp(width):.2f} x {math.exp(height):.2f} at {x:+.2f}, {y:+.2f}")
    return ", ".join(phrases) or "no change"


def _describe_jitter(name: str, value: float) -> str:
    return f"{name} {value * 360:+.0f}°" if name == "hue" else f"{name} {value:+.2f}"
