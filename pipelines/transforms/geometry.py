"""Crop windows in pixels of the stored image, and the position of the source view in the target view."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float32

from iwm_fast.pipelines.transforms.base import Parameters
from iwm_fast.pipelines.transforms.composition import Draws


class Windows(NamedTuple):
    """The regions that the views of B images show: top, left, height and width, in pixels of the upright image."""

    shared: Float32[np.ndarray, "B 4"]
    """The crop that both views are rendered from; the target view shows all of it."""
    source: Float32[np.ndarray, "B 4"]
    """The region of the source view, inside the shared crop; the same without further crops of the source view."""


def view_windows(draws: Draws, shape: np.ndarray) -> Windows:
    """Return the windows of both views, for images whose (B, 2) heights and widths are `shape`."""
    shared = crop_window(draws.crop, shape)
    return Windows(shared=shared, source=source_window(draws.source_crop, shared))


def crop_window(crop: Float32[np.ndarray, "B 4"], shape: np.ndarray) -> Float32[np.ndarray, "B 4"]:
    """Return top, left, height and width of crops, in pixels of images whose (B, 2) heights and widths are `shape`.

    A crop that does not fit into its image is shrunk and keeps its aspect. torchvision draws it again instead; here the
    window must be a function of a single draw.
    """
    height, width = shape[:, 0].astype(np.float32), shape[:, 1].astype(np.float32)
    root = np.sqrt(height * width)
    drawn_width, drawn_height = crop[:, 0] * root, crop[:, 1] * root
    fit = np.minimum(np.minimum(width / drawn_width, height / drawn_height), np.float32(1))
    crop_height = np.clip(np.floor(drawn_height * fit + np.float32(0.5)), 1, height)
    crop_width = np.clip(np.floor(drawn_width * fit + np.float32(0.5)), 1, width)
    # The minimum is needed because a position just below 1 may have been rounded to 1 in float32.
    left = np.minimum(np.floor(crop[:, 2] * (width - crop_width + np.float32(1))), width - crop_width)
    top = np.minimum(np.floor(crop[:, 3] * (height - crop_height + np.float32(1))), height - crop_height)
    return np.stack((top, left, crop_height, crop_width), axis=1).astype(np.float32)


def source_window(
    source_crop: Float32[np.ndarray, "B 4"], window: Float32[np.ndarray, "B 4"]
) -> Float32[np.ndarray, "B 4"]:
    """Return top, left, height and width of the source view's further crop, in pixels of the stored image.

    `window` is the window of the shared crop.
    """
    top, left, height, width = window.T
    inner_width = np.clip(np.floor(source_crop[:, 0] * width + np.float32(0.5)), 1, width)
    inner_height = np.clip(np.floor(source_crop[:, 1] * height + np.float32(0.5)), 1, height)
    inner_left = np.minimum(np.floor(source_crop[:, 2] * (width - inner_width + np.float32(1))), width - inner_width)
    inner_top = np.minimum(np.floor(source_crop[:, 3] * (height - inner_height + np.float32(1))), height - inner_height)
    return np.stack((top + inner_top, left + inner_left, inner_height, inner_width), axis=1).astype(np.float32)


def source_geometry(
    draws: Draws, window: Float32[np.ndarray, "B 4"], source_window: Float32[np.ndarray, "B 4"]
) -> Parameters:
    """Return the position of the source view in the target view: centre x and y, log width, log height, and mirrored.

    The centre is relative to the target view's centre, in units of the target view's width and height, with x to the
    right and y down. Width and height are relative to the target view's. All five are 0 where the views show the same.
    """
    top, left, height, width = window.T.astype(np.float64)
    inner_top, inner_left, inner_height, inner_width = source_window.T.astype(np.float64)
    right = (inner_left + inner_width / 2 - left - width / 2) / width
    down = (inner_top + inner_height / 2 - top - height / 2) / height
    position = {
        # Windows refer to the stored image, of which the target view may be a mirror image.
        "crop_x": np.where(draws.flip, -right, right),
        "crop_y": down,
        "crop_width": np.log(inner_width / width),
        "crop_height": np.log(inner_height / height),
        "flip": draws.source_flip,
    }
    return {name: values.astype(np.float32) for name, values in position.items()}
