"""The DALI graph: encoded bytes and drawn parameters in, two rendered views and the crop window out.

No reader and no random operator: everything drawn enters as data, so what the predictor is told is by construction
what happened to the pixels. The same function builds the graph for CPU and GPU. `pipelines.views` is its plain twin.
"""

# DALI's enums and graph nodes are typed too loosely to check
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvidia.dali import fn, math, types
from nvidia.dali.pipeline import Pipeline

from pipelines.actions import LUMA, Draws, blur_radius, color_matrix, gray_gain

_JITTER = {"matrix": (types.FLOAT, 2), "gain": (types.FLOAT, 0)}
_DESTROY = {
    "gray_matrix": (types.FLOAT, 2),
    "blur_sigma": (types.FLOAT, 0),
    "blur_window": (types.INT32, 0),
    "solarize_from": (types.INT32, 0),
}
_INPUTS = {
    "encoded": (types.UINT8, 1),
    "crop": (types.FLOAT, 1),
    "flip": (types.INT32, 0),
    **{f"target_{name}": kind for name, kind in _JITTER.items()},
    **{f"source_{name}": kind for name, kind in (_JITTER | _DESTROY).items()},
}
_TO_GRAY = np.tile(np.float32(LUMA), (3, 1))


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """What is decided when the graph is built."""

    view_size: int
    """Side of both views in pixels."""
    max_batch_size: int
    num_threads: int
    prefetch: int
    """Batches computed ahead."""
    device_id: int | None
    """GPU number; None computes on the CPU."""


def graph_parameters(draws: Draws) -> tuple[np.ndarray, ...]:
    """Lay out what is drawn for one batch in the order the graph takes it, behind the encoded images.

    Every operation runs on every sample, with parameters that leave uint8 pixels bit-equal where it was not drawn:
    the identity matrix, a window of one pixel, a threshold above all values.
    """
    source, target = draws.source, draws.target
    gray_matrix = np.where(source.grayscale[:, None, None], _TO_GRAY, np.eye(3, dtype=np.float32))
    window = np.where(source.blur, 2 * blur_radius(source.blur_sigma) + 1, 1).astype(np.int32)
    solarize_from = np.where(source.solarize, 128, 256).astype(np.int32)
    jitter = (color_matrix(target), gray_gain(target), color_matrix(source), gray_gain(source))
    flip = draws.flip.astype(np.int32)
    return (draws.crop, flip, *jitter, gray_matrix, source.blur_sigma, window, solarize_from)


def build_graph(settings: GraphSettings, next_inputs: Callable[[], tuple[Any, ...]]) -> Pipeline:
    """Build the pipeline; it calls `next_inputs` once per batch and returns (source view, target view, window)."""
    graph = Pipeline(
        batch_size=settings.max_batch_size,
        num_threads=settings.num_threads,
        device_id=settings.device_id,
        prefetch_queue_depth=settings.prefetch,
    )
    dtypes, dimensions = zip(*_INPUTS.values(), strict=True)
    with graph:
        fed = fn.external_source(
            source=next_inputs, num_outputs=len(_INPUTS), batch=True, dtype=list(dtypes), ndim=list(dimensions)
        )
        data = dict(zip(_INPUTS, fed, strict=True))
        graph.set_outputs(*_two_views(data, settings.view_size, is_gpu=settings.device_id is not None))
    graph.build()
    return graph


def _two_views(data, size, *, is_gpu):
    window = crop_window_nodes(data["crop"], fn.peek_image_shape(data["encoded"], dtype=types.FLOAT))
    crop = decode_crop(data["encoded"], window, size, is_gpu=is_gpu)
    crop = fn.flip(crop, horizontal=data["flip"])
    target_view = jitter_nodes(crop, data["target_matrix"], data["target_gain"], is_gpu=is_gpu)
    source_view = jitter_nodes(crop, data["source_matrix"], data["source_gain"], is_gpu=is_gpu)
    source_view = fn.coord_transform(source_view, M=data["source_gray_matrix"], dtype=types.UINT8)
    source_view = fn.gaussian_blur(source_view, sigma=data["source_blur_sigma"], window_size=data["source_blur_window"])
    source_view = solarize_nodes(source_view, data["source_solarize_from"], is_gpu=is_gpu)
    return source_view, target_view, window


def crop_window_nodes(crop, shape):
    """Compute the window as `pipelines.actions.crop_window` does, in the same order of float32 operations."""
    height, width = shape[0], shape[1]
    root = math.sqrt(height * width)
    asked_width, asked_height = crop[0] * root, crop[1] * root
    fit = math.min(math.min(width / asked_width, height / asked_height), 1.0)
    crop_height = math.clamp(math.floor(asked_height * fit + 0.5), 1.0, height)
    crop_width = math.clamp(math.floor(asked_width * fit + 0.5), 1.0, width)
    left = math.min(math.floor(crop[2] * (width - crop_width + 1.0)), width - crop_width)
    top = math.min(math.floor(crop[3] * (height - crop_height + 1.0)), height - crop_height)
    return fn.stack(top, left, crop_height, crop_width)


def decode_crop(encoded, window, size, *, is_gpu):
    """Decode only the window and resize it to a square, antialiased."""
    corner = fn.cast(window[0:2], dtype=types.INT32)
    extent = fn.cast(window[2:4], dtype=types.INT32)
    device = "mixed" if is_gpu else "cpu"
    pixels = fn.decoders.image_slice(encoded, start=corner, shape=extent, axes=[0, 1], device=device)
    return fn.resize(pixels, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)


def jitter_nodes(crop, matrix, gain, *, is_gpu):
    """Apply the affine colour map: matrix times pixel plus gain times the grey mean, one clamp."""
    channel_means = fn.reductions.mean(crop, axes=[0, 1], dtype=types.FLOAT)
    gray_mean = fn.reductions.sum(channel_means * types.Constant(np.float32(LUMA), device="gpu" if is_gpu else "cpu"))
    mapped = fn.coord_transform(crop, M=matrix, dtype=types.FLOAT)
    # operators take matrix as an argument from the CPU; arithmetic needs gain where the pixels are
    return fn.cast(mapped + (gain.gpu() if is_gpu else gain) * gray_mean, dtype=types.UINT8)


def solarize_nodes(pixels, threshold, *, is_gpu):
    """Invert values from the threshold on."""
    is_bright = pixels >= (threshold.gpu() if is_gpu else threshold)
    # x + is_bright * (255 - 2 x), in integers
    return fn.cast(pixels + is_bright * (255 - 2 * fn.cast(pixels, dtype=types.INT32)), dtype=types.UINT8)
