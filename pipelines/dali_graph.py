"""The DALI graph: encoded bytes and drawn parameters in, two rendered views and their windows out.

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
from pipelines.config import ViewConfig

_COLOR = {"matrix": (types.FLOAT, 2), "gain": (types.FLOAT, 0)}
_DESTROY = {
    "blur_sigma": (types.FLOAT, 0),
    "blur_window": (types.INT32, 0),
    "solarize_from": (types.INT32, 0),
}
_INPUTS = {
    "encoded": (types.UINT8, 1),
    "crop": (types.FLOAT, 1),
    "flip": (types.INT32, 0),
    **{f"target_{name}": kind for name, kind in _COLOR.items()},
    **{f"source_{name}": kind for name, kind in (_COLOR | _DESTROY).items()},
}
# only where the source view has a place of its own
_GEOMETRY = {"source_crop": (types.FLOAT, 1), "source_flip": (types.INT32, 0)}


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """What is decided when the graph is built."""

    views: ViewConfig
    max_batch_size: int
    num_threads: int
    prefetch: int
    """Batches computed ahead."""
    device_id: int | None
    """GPU number; None computes on the CPU."""
    hw_decoder_load: float | None = None
    """Share of the JPEGs that a GPU's own decoder takes; None: DALI's default."""
    preallocate: tuple[int, int] | None = None
    """Width and height for which a GPU's own decoder makes room at the start; None: as images come."""


def graph_parameters(draws: Draws, *, has_source_geometry: bool = False) -> tuple[np.ndarray, ...]:
    """Lay out what is drawn for one batch in the order the graph takes it, behind the encoded images.

    Every operation runs on every sample, with parameters that leave uint8 pixels bit-equal where it was not drawn:
    the identity matrix, a window of one pixel, a threshold above all values.
    """
    source, target = draws.source, draws.target
    window = np.where(source.blur, 2 * blur_radius(source.blur_sigma) + 1, 1).astype(np.int32)
    solarize_from = np.where(source.solarize, 128, 256).astype(np.int32)
    colors = (color_matrix(target), gray_gain(target), color_matrix(source), gray_gain(source))
    flip, source_flip = (flags.astype(np.int32) for flags in (draws.flip, draws.flip ^ draws.source_flip))
    photometry = (draws.crop, flip, *colors, source.blur_sigma, window, solarize_from)
    return (*photometry, draws.source_crop, source_flip) if has_source_geometry else photometry


def build_graph(settings: GraphSettings, next_inputs: Callable[[], tuple[Any, ...]]) -> Pipeline:
    """Build the pipeline; it calls `next_inputs` once per batch.

    It returns source view, target view, window of the target view, and window of the source view in it.
    """
    graph = Pipeline(
        batch_size=settings.max_batch_size,
        num_threads=settings.num_threads,
        device_id=settings.device_id,
        prefetch_queue_depth=settings.prefetch,
    )
    inputs = _INPUTS | (_GEOMETRY if settings.views.has_source_geometry else {})
    dtypes, dimensions = zip(*inputs.values(), strict=True)
    with graph:
        fed = fn.external_source(
            source=next_inputs, num_outputs=len(inputs), batch=True, dtype=list(dtypes), ndim=list(dimensions)
        )
        data = dict(zip(inputs, fed, strict=True))
        graph.set_outputs(*_two_views(data, settings))
    graph.build()
    return graph


def _two_views(data, settings):
    size, is_gpu = settings.views.size, settings.device_id is not None
    window = crop_window_nodes(data["crop"], fn.peek_image_shape(data["encoded"], dtype=types.FLOAT))
    pixels = decode_window(data["encoded"], window, settings)
    inner, target = window, fn.flip(to_square(pixels, size), horizontal=data["flip"])
    source = target
    if settings.views.has_source_geometry:
        inner = source_window_nodes(data["source_crop"], window)
        corner = fn.cast(inner[0:2] - window[0:2], dtype=types.INT32)
        pixels = fn.slice(pixels, start=corner, shape=fn.cast(inner[2:4], dtype=types.INT32), axes=[0, 1])
        source = fn.flip(to_square(pixels, size), horizontal=data["source_flip"])
    target_view = recolor_nodes(target, data["target_matrix"], data["target_gain"], is_gpu=is_gpu)
    source_view = recolor_nodes(source, data["source_matrix"], data["source_gain"], is_gpu=is_gpu)
    source_view = fn.gaussian_blur(source_view, sigma=data["source_blur_sigma"], window_size=data["source_blur_window"])
    source_view = solarize_nodes(source_view, data["source_solarize_from"], is_gpu=is_gpu)
    return source_view, target_view, window, inner


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


def source_window_nodes(crop, window):
    """Compute the window as `pipelines.actions.source_window` does, in the same order of float32 operations."""
    top, left, height, width = (window[place] for place in range(4))
    inner_width = math.clamp(math.floor(crop[0] * width + 0.5), 1.0, width)
    inner_height = math.clamp(math.floor(crop[1] * height + 0.5), 1.0, height)
    inner_left = math.min(math.floor(crop[2] * (width - inner_width + 1.0)), width - inner_width)
    inner_top = math.min(math.floor(crop[3] * (height - inner_height + 1.0)), height - inner_height)
    return fn.stack(top + inner_top, left + inner_left, inner_height, inner_width)


def decode_window(encoded, window, settings):
    """Decode only the window."""
    corner = fn.cast(window[0:2], dtype=types.INT32)
    extent = fn.cast(window[2:4], dtype=types.INT32)
    hints = {}
    if settings.device_id is not None:
        # chroma is upsampled as libjpeg does it on the CPU, so that both see the same pixels
        hints["jpeg_fancy_upsampling"] = True
        if settings.hw_decoder_load is not None:
            hints["hw_decoder_load"] = settings.hw_decoder_load
        if settings.preallocate is not None:
            hints |= dict(zip(("preallocate_width_hint", "preallocate_height_hint"), settings.preallocate, strict=True))
    device = "cpu" if settings.device_id is None else "mixed"
    return fn.decoders.image_slice(encoded, start=corner, shape=extent, axes=[0, 1], device=device, **hints)


def to_square(pixels, size):
    """Resize to a square, antialiased."""
    return fn.resize(pixels, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)


def recolor_nodes(crop, matrix, gain, *, is_gpu):
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
