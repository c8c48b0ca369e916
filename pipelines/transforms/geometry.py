"""Where the views lie: crop windows in pixels of the stored image, and the source view in the target view."""

import numpy as np
from jaxtyping import Float32

from iwm_fast.pipelines.transforms.parameters import Draws


def crop_window(crop: Float32[np.ndarray, "B 4"], shape: np.ndarray) -> Float32[np.ndarray, "B 4"]:
    """Return top, left, height, width in pixels of images with the given (B, 2) heights and widths.

    A crop that does not fit is shrunk with its aspect kept, instead of being drawn again as torchvision does: so the
    window is a function of one draw. The DALI graph has the same arithmetic, in the same order, in float32.
    """
    height, width = shape[:, 0].astype(np.float32), shape[:, 1].astype(np.float32)
    root = np.sqrt(height * width)
    asked_width, asked_height = crop[:, 0] * root, crop[:, 1] * root
    fit = np.minimum(np.minimum(width / asked_width, height / asked_height), np.float32(1))
    crop_height = np.clip(np.floor(asked_height * fit + np.float32(0.5)), 1, height)
    crop_width = np.clip(np.floor(asked_width * fit + np.float32(0.5)), 1, width)
    left = np.minimum(np.floor(crop[:, 2] * (width - crop_width + np.float32(1))), width - crop_width)
    top = np.minimum(np.floor(crop[:, 3] * (height - crop_height + np.float32(1))), height - crop_height)
    return np.stack((top, left, crop_height, crop_width), axis=1).astype(np.float32)


def source_window(
    source_crop: Float32[np.ndarray, "B 4"], window: Float32[np.ndarray, "B 4"]
) -> Float32[np.ndarray, "B 4"]:
    """Return top, left, height, width of the source's further crop in the stored image, given the shared window.

    The DALI graph has the same arithmetic, in the same order, in float32.
    """
    top, left, height, width = window.T
    inner_width = np.clip(np.floor(source_crop[:, 0] * width + np.float32(0.5)), 1, width)
    inner_height = np.clip(np.floor(source_crop[:, 1] * height + np.float32(0.5)), 1, height)
    inner_left = np.minimum(np.floor(source_crop[:, 2] * (width - inner_width + np.float32(1))), width - inner_width)
    inner_top = np.minimum(np.floor(source_crop[:, 3] * (height - inner_height + np.float32(1))), height - inner_height)
    return np.stack((top + inner_top, left + inner_left, inner_height, inner_width), axis=1).astype(np.float32)


def source_geometry(
    draws: Draws, window: Float32[np.ndarray, "B 4"], source_window: Float32[np.ndarray, "B 4"]
) -> Float32[np.ndarray, "B 5"]:
    """Return where the source view lies in the target view: centre x and y, log width and log height, mirrored.

    The centre is counted from the target's, in its widths and heights, to the right and down; windows are pixels of
    the stored image. All five are 0 where both views show the same.
    """
    top, left, height, width = window.T.astype(np.float64)
    inner_top, inner_left, inner_height, inner_width = source_window.T.astype(np.float64)
    right = (inner_left + inner_width / 2 - left - width / 2) / width
    down = (inner_top + inner_height / 2 - top - height / 2) / height
    size = (np.log(inner_width / width), np.log(inner_height / height))
    # windows lie in the stored image, the target view may be its mirror image
    return np.stack((np.where(draws.flip, -right, right), down, *size, draws.source_flip), axis=1).astype(np.float32)
