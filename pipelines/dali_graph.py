"""The DALI graph: encoded bytes and drawn parameters in, two rendered views and the crop window out.

No reader and no random operator: everything drawn enters as data, so what the predictor is told is by construction
what happened to the pixels. The same function builds the graph for CPU and GPU. `pipelines.views` is its plain twin.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.math as math
import nvidia.dali.types as types
from nvidia.dali import Pipeline, pipeline_def
from nvidia.dali.pipeline import do_not_convert

from pipelines.actions import LUMA, Draws, Photometry, color_matrix, gray_gain

_SCALARS = {"matrix": (types.FLOAT, 2), "gain": (types.FLOAT, 0)}
_FLAGS = {"grayscale": (types.BOOL, 0), "blur": (types.BOOL, 0), "sigma": (types.FLOAT, 0), "solarize": (types.BOOL, 0)}
_INPUTS = {
    "encoded": (types.UINT8, 1),
    "crop": (types.FLOAT, 1),
    "flip": (types.INT32, 0),
    **{f"target_{name}": kind for name, kind in _SCALARS.items()},
    **{f"source_{name}": kind for name, kind in (_SCALARS | _FLAGS).items()},
}


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


def graph_inputs(encoded: list[np.ndarray], draws: Draws) -> tuple[Any, ...]:
    """Lay out one batch in the order the graph takes it."""
    source, target = draws.source, draws.target
    flags = (source.grayscale, source.blur, source.blur_sigma, source.solarize)
    return (encoded, draws.crop, draws.flip.astype(np.int32), *_map(target), *_map(source), *flags)


def _map(photometry: Photometry) -> tuple[np.ndarray, np.ndarray]:
    return color_matrix(photometry), gray_gain(photometry)


def build_graph(settings: GraphSettings, next_inputs: Callable[[], tuple[Any, ...]]) -> Pipeline:
    """Build the pipeline; it calls `next_inputs` once per batch and returns (source view, target view, window)."""
    graph = _two_views(
        batch_size=settings.max_batch_size,
        num_threads=settings.num_threads,
        device_id=settings.device_id,
        prefetch_queue_depth=settings.prefetch,
        next_inputs=next_inputs,
        size=settings.view_size,
        is_gpu=settings.device_id is not None,
    )
    graph.build()
    return graph


@do_not_convert
def _fed_inputs(next_inputs):
    dtypes, dimensions = zip(*_INPUTS.values(), strict=True)
    fed = fn.external_source(
        source=next_inputs, num_outputs=len(_INPUTS), batch=True, dtype=list(dtypes), ndim=list(dimensions)
    )
    return dict(zip(_INPUTS, fed, strict=True))


@pipeline_def(enable_conditionals=True)
def _two_views(next_inputs, size, is_gpu):
    data = _fed_inputs(next_inputs)
    window = crop_window_nodes(data["crop"], fn.peek_image_shape(data["encoded"], dtype=types.FLOAT))
    crop = decode_crop(data["encoded"], window, size, is_gpu)
    crop = fn.flip(crop, horizontal=data["flip"])
    target_view = jitter_nodes(crop, data["target_matrix"], data["target_gain"], is_gpu)
    source_view = jitter_nodes(crop, data["source_matrix"], data["source_gain"], is_gpu)
    if data["source_grayscale"]:
        source_view = grayscale_nodes(source_view)
    if data["source_blur"]:
        source_view = fn.gaussian_blur(source_view, sigma=data["source_sigma"])
    if data["source_solarize"]:
        source_view = solarize_nodes(source_view)
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


def decode_crop(encoded, window, size, is_gpu):
    """Decode only the window and resize it to a square, antialiased."""
    corner = fn.cast(window[0:2], dtype=types.INT32)
    extent = fn.cast(window[2:4], dtype=types.INT32)
    device = "mixed" if is_gpu else "cpu"
    pixels = fn.decoders.image_slice(encoded, start=corner, shape=extent, axes=[0, 1], device=device)
    return fn.resize(pixels, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)


def jitter_nodes(crop, matrix, gain, is_gpu):
    """Apply the affine colour map: matrix times pixel plus gain times the grey mean, one clamp."""
    channel_means = fn.reductions.mean(crop, axes=[0, 1], dtype=types.FLOAT)
    gray_mean = fn.reductions.sum(channel_means * types.Constant(np.float32(LUMA)))
    mapped = fn.coord_transform(crop, M=matrix, dtype=types.FLOAT)
    # gain stays a CPU input for the CPU graph; on a GPU it joins graph arithmetic there
    return fn.cast(mapped + (gain.gpu() if is_gpu else gain) * gray_mean, dtype=types.UINT8)


def grayscale_nodes(pixels):
    """Replace each pixel by its luma, in three channels."""
    return fn.coord_transform(pixels, M=np.tile(LUMA, 3).tolist(), dtype=types.UINT8)


def solarize_nodes(pixels):
    """Invert values of 128 and more."""
    is_bright = pixels >= 128
    return fn.cast(pixels * (is_bright == False) + (255 - pixels) * is_bright, dtype=types.UINT8)  # noqa: E712
