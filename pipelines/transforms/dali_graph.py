"""The DALI graph: encoded bytes and drawn parameters in, two rendered views and their windows out.

One function makes it for CPU and GPU; where it runs on the CPU, loaders let it end at the crops, since DALI's operators
for photometry are slow there, and `iwm_fast.pipelines.transforms.cpu_renderer` does the rest.

No reader and no random operator: everything drawn enters as data, so what the predictor is told is by construction
what happened to the pixels. `iwm_fast.pipelines.transforms.torch_renderer` is its plain twin.

An operation runs only for the samples it was drawn for (DALI's conditional execution): on a CPU that is faster than
running it on all of them with parameters that change nothing, with the same pixels (benchmarks/README.md).
"""

# DALI's enums and graph nodes are typed too loosely to check
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, no_type_check

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.pipeline import Pipeline, do_not_convert

from iwm_fast.pipelines.config import ViewConfig
from iwm_fast.pipelines.transforms.normalization import PIXEL_MEAN, PIXEL_STD
from iwm_fast.pipelines.transforms.parameters import LUMA, Draws, Photometry, blur_radius, color_matrix, gray_gain

_COLOR = {"is_recolored": (types.BOOL, 0), "matrix": (types.FLOAT, 2), "gain": (types.FLOAT, 0)}
_DESTROY = {
    "is_blurred": (types.BOOL, 0),
    "blur_sigma": (types.FLOAT, 0),
    "blur_window": (types.INT32, 0),
    "is_solarized": (types.BOOL, 0),
}
_CROP = {"encoded": (types.UINT8, 1), "crop": (types.FLOAT, 1), "flip": (types.INT32, 0)}
_PHOTOMETRY = {
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
    output: Literal["crops", "pixels", "normalized"] = "pixels"
    """What leaves as views: as the networks take them, (B, 3, H, W) float32; or as pixels, (B, H, W, 3) uint8;
    or pixels before photometry, so that `iwm_fast.pipelines.transforms.cpu_renderer` does the rest."""

    @property
    def of_pipeline(self) -> dict[str, Any]:
        """Arguments of DALI's `Pipeline`."""
        return {
            "batch_size": self.max_batch_size,
            "num_threads": self.num_threads,
            "device_id": self.device_id,
            "prefetch_queue_depth": self.prefetch,
        }


def graph_parameters(draws: Draws, settings: GraphSettings) -> tuple[np.ndarray, ...]:
    """Lay out what is drawn for one batch in the order the graph takes it, behind the encoded images."""
    source = draws.source
    flip, source_flip = (flags.astype(np.int32) for flags in (draws.flip, draws.flip ^ draws.source_flip))
    geometry = (draws.source_crop, source_flip) if settings.views.has_source_geometry else ()
    if settings.output == "crops":
        return (draws.crop, flip, *geometry)
    window = np.asarray(2 * blur_radius(source.blur_sigma) + 1, np.int32)
    destroy = (source.blur, source.blur_sigma, window, source.solarize)
    return (draws.crop, flip, *geometry, *_color_parameters(draws.target), *_color_parameters(source), *destroy)


def _color_parameters(photometry: Photometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    matrix, gain = color_matrix(photometry), gray_gain(photometry)
    is_recolored = (matrix != np.eye(3, dtype=np.float32)).any(axis=(1, 2)) | (gain != 0)
    return is_recolored, matrix, gain


def build_graph(settings: GraphSettings, next_inputs: Callable[[], tuple[Any, ...]]) -> Pipeline:
    """Build the pipeline; it calls `next_inputs` once per batch.

    It returns source view, target view, window of the target view, and window of the source view.
    """
    build = _two_crops if settings.output == "crops" else _two_views
    graph = build(next_inputs, settings, **settings.of_pipeline)
    graph.build()
    return graph


@pipeline_def
@no_type_check  # DALI calls it with other arguments than it is declared with
def _two_crops(next_inputs, settings):
    return crop_nodes(fed(crop_inputs(settings), next_inputs), settings)


@pipeline_def(enable_conditionals=True)
@no_type_check  # DALI rewrites the function's code, so that `if` splits a batch, and wants it bare
def _two_views(next_inputs, settings):
    is_gpu, has_geometry = settings.device_id is not None, settings.views.has_source_geometry
    data = fed(crop_inputs(settings) | _PHOTOMETRY, next_inputs)
    source_view, target_view, window, inner = crop_nodes(data, settings)
    # one mean for both views where they show the same
    target_gray = gray_mean_nodes(target_view, is_gpu=is_gpu)
    source_gray = gray_mean_nodes(source_view, is_gpu=is_gpu) if has_geometry else target_gray
    # operators take a matrix as an argument from the CPU; arithmetic needs its gain where the pixels are
    gains = [data["target_gain"], data["source_gain"]]
    target_gain, source_gain = [gain.gpu() for gain in gains] if is_gpu else gains
    if data["target_is_recolored"]:
        target_view = recolor_nodes(target_view, data["target_matrix"], target_gain * target_gray)
    if data["source_is_recolored"]:
        source_view = recolor_nodes(source_view, data["source_matrix"], source_gain * source_gray)
    if data["source_is_blurred"]:
        sigma, width = data["source_blur_sigma"], data["source_blur_window"]
        source_view = fn.gaussian_blur(source_view, sigma=sigma, window_size=width)
    if data["source_is_solarized"]:
        source_view = solarize_nodes(source_view)
    if settings.output == "normalized":
        source_view, target_view = normalize_nodes(source_view), normalize_nodes(target_view)
    return source_view, target_view, window, inner


@do_not_convert
def crop_inputs(settings):
    """Return type and dimensions of what crops are made of, by name."""
    return _CROP | (_GEOMETRY if settings.views.has_source_geometry else {})


def crop_nodes(data, settings):
    """Decode and crop: source, target, window of the target and of the source; without photometry."""
    size = settings.views.size
    window = crop_window_nodes(data["crop"], fn.peek_image_shape(data["encoded"], dtype=types.FLOAT))
    pixels = decode_window(data["encoded"], window, settings)
    target = fn.flip(to_square(pixels, size), horizontal=data["flip"])
    if not settings.views.has_source_geometry:
        return target, target, window, window
    inner = source_window_nodes(data["source_crop"], window)
    corner = fn.cast(inner[0:2] - window[0:2], dtype=types.INT32)
    pixels = fn.slice(pixels, start=corner, shape=fn.cast(inner[2:4], dtype=types.INT32), axes=[0, 1])
    source = fn.flip(to_square(pixels, size), horizontal=data["source_flip"])
    return source, target, window, inner


@do_not_convert
def fed(inputs, next_inputs):
    """Return nodes for what `next_inputs` hands over, by name; `inputs` has the type and dimensions of each."""
    dtypes, dimensions = zip(*inputs.values(), strict=True)
    nodes = fn.external_source(
        source=next_inputs, num_outputs=len(inputs), batch=True, dtype=list(dtypes), ndim=list(dimensions)
    )
    return dict(zip(inputs, nodes, strict=True))


def crop_window_nodes(crop, shape):
    """Compute the window as `geometry.crop_window` does, in the same order of float32 operations."""
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
    """Compute the window as `geometry.source_window` does, in the same order of float32 operations."""
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


def gray_mean_nodes(pixels, *, is_gpu):
    """Compute the mean luma of each image."""
    channel_means = fn.reductions.mean(pixels, axes=[0, 1], dtype=types.FLOAT)
    return fn.reductions.sum(channel_means * types.Constant(np.float32(LUMA), device="gpu" if is_gpu else "cpu"))


def recolor_nodes(pixels, matrix, offset):
    """Apply the affine colour map: matrix times pixel plus offset, one clamp."""
    return fn.cast(fn.coord_transform(pixels, M=matrix, dtype=types.FLOAT) + offset, dtype=types.UINT8)


def solarize_nodes(pixels):
    """Invert values of 128 and more."""
    # x + (x >= 128) * (255 - 2 x), in integers
    inverted = (pixels >= 128) * (255 - 2 * fn.cast(pixels, dtype=types.INT32))
    return fn.cast(pixels + inverted, dtype=types.UINT8)


def normalize_nodes(pixels):
    """Do what `normalization.normalize_view` does."""
    mean, std = ([255 * value for value in values] for values in (PIXEL_MEAN, PIXEL_STD))
    return fn.crop_mirror_normalize(pixels, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std)
