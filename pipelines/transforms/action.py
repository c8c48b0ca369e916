"""The action: what the predictor is told of the change from source to target view, its inverse and its words."""

import math

import numpy as np
from jaxtyping import Float32

from iwm_fast.pipelines.config import CROP_ENTRIES, FLIP_ENTRY, ViewConfig
from iwm_fast.pipelines.transforms.parameters import JITTER, Photometry


def _entry_scale(config: ViewConfig, name: str) -> float:
    if name in JITTER:
        # a strength of 0 leaves a difference of 0, whatever it is divided by
        return getattr(config, name) or 1.0
    if name in CROP_ENTRIES and config.source_crop is not None:
        smallest = config.source_crop[0] ** 0.5
        return ((1 - smallest) / 2 if name in ("crop_x", "crop_y") else -math.log(smallest)) or 1.0
    return 1.0


def action_vector(
    source: Photometry,
    target: Photometry,
    config: ViewConfig,
    geometry: Float32[np.ndarray, "B 5"] | None = None,
) -> Float32[np.ndarray, "B A"]:
    """Return what the predictor is told: target minus source of the jitter over its strength, flags of the source.

    `geometry` comes from `source_geometry`; without it both views show the same place. Zero means that nothing changed.
    Source: paper section 3 for the photometric entries; scaling to order one and the crop's entries are ours.
    """
    place = dict(
        zip((*CROP_ENTRIES, FLIP_ENTRY), (np.zeros((len(source), 5)) if geometry is None else geometry).T, strict=True)
    )
    columns = []
    for name in config.entries:
        if name in JITTER:
            columns.append((getattr(target, name) - getattr(source, name)) / _entry_scale(config, name))
        elif name in place:
            columns.append(place[name] / _entry_scale(config, name))
        else:
            columns.append(getattr(source, name).astype(np.float32))
    return np.stack(columns, axis=1).astype(np.float32)


def action_difference(action: Float32[np.ndarray, "B A"], config: ViewConfig) -> dict[str, np.ndarray]:
    """Invert `action_vector`: each entry's name with its change in natural units (factors, turns, shares, flags)."""
    return {name: action[:, column] * _entry_scale(config, name) for column, name in enumerate(config.entries)}


def action_of(change: dict[str, float], config: ViewConfig) -> Float32[np.ndarray, "1 A"]:
    """Return the action of a change in natural units; what is not named does not change."""
    row = [change.get(name, 0.0) / _entry_scale(config, name) for name in config.entries]
    return np.array([row], np.float32)


def describe_action(action: Float32[np.ndarray, "A"], config: ViewConfig) -> str:
    """Say in words what one action asks for, for pictures and logs."""
    change = {name: float(value) for name, (value,) in action_difference(action[None], config).items()}
    parts = [_describe_jitter(name, change[name]) for name in JITTER if abs(change.get(name, 0)) > 5e-3]
    undo = {"blur": "sharpen", "grayscale": "colour", "solarize": "undo solarize", FLIP_ENTRY: "mirror"}
    parts += [words for name, words in undo.items() if change.get(name, 0) > 0.5]
    if any(abs(change.get(name, 0)) > 5e-3 for name in CROP_ENTRIES):
        x, y, width, height = (change.get(name, 0.0) for name in CROP_ENTRIES)
        parts.append(f"from a crop of {math.exp(width):.2f} x {math.exp(height):.2f} at {x:+.2f}, {y:+.2f}")
    return ", ".join(parts) or "no change"


def _describe_jitter(name: str, value: float) -> str:
    return f"{name} {value * 360:+.0f}°" if name == "hue" else f"{name} {value:+.2f}"
