"""The DALI graph: it takes encoded images, crop windows and random parameters, and returns two rendered views.

The same function builds it for all devices. On a CPU, loaders let the graph end at the decoded crops, since DALI's CPU
operators for resizing and photometric transformations are slow; `iwm_fast.pipelines.transforms.cpu_renderer` does the
rest.

The graph contains no reader and no random operator. All random parameters are inputs, so the action is computed from
exactly the parameters that changed the pixels. `iwm_fast.pipelines.transforms.torch_renderer` is the reference
implementation.

An operation runs only for the samples it was drawn for (DALI's conditional execution). On a CPU this is faster than
running it for all samples with neutral parameters, and the pixels are equal.
"""

# DALI's enums and graph nodes are typed too loosely to be checked.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportPrivateImportUsage=false

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, no_type_check

import numpy as np
import torch
from jaxtyping import Float32, Int32
from nvidia import dali
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline, do_not_convert
from nvidia.dali.plugin.pytorch import feed_ndarray

from iwm_fast.pipelines.config import IMAGENET, Normalization
from iwm_fast.pipelines.transforms.base import Parameters, PixelOperation
from iwm_fast.pipelines.transforms.color_map import LUMA
from iwm_fast.pipelines.transforms.composition import Draws, ViewConfig, fused_color_map
from iwm_fast.pipelines.transforms.geometry import Windows

# The inputs of the graph by name: type and number of dimensions per sample.
CROP_INPUTS = {"encoded": (types.UINT8, 1), "corner": (types.INT32, 1), "extent": (types.INT32, 1)}
"""The inputs that `decode_crop` needs: encoded images, then top and left, height and width of the crops in pixels."""
_FLIP = {"flip": (types.INT32, 0)}
_IS_APPLIED = {"is_applied": (types.BOOL, 0)}
_COLOR_MAP = {"matrix": (types.FLOAT, 2), "gain": (types.FLOAT, 0)}
# Inputs only if `ViewConfig.has_source_geometry`.
_GEOMETRY = {"source_corner": (types.INT32, 1), "source_extent": (types.INT32, 1), "source_flip": (types.INT32, 0)}


@dataclass(frozen=True, kw_only=True)
class GraphSettings:
    """The settings that a graph is built with; they cannot change while it runs."""

    views: ViewConfig
    max_batch_size: int
    """Largest number of images in a batch."""
    num_threads: int
    """CPU threads of DALI."""
    prefetch: int
    """Number of batches that DALI computes ahead."""
    device_id: int | None
    """Number of the GPU; None runs the graph on the CPU."""
    decode: Literal["gpu", "cpu"] = "gpu"
    """Whether a graph on a GPU decodes there, or on the CPU and renders the crops on the GPU."""
    hw_decoder_load: float | None = None
    """Fraction of the JPEG images that the GPU's hardware decoder takes; None for DALI's default."""
    preallocate: tuple[int, int] | None = None
    """Width and height for which the GPU's hardware decoder allocates memory in advance; None to allocate on demand."""
    normalization: Normalization = IMAGENET
    """Mean and standard deviation of the output "normalized"."""
    output: Literal["crops", "pixels", "normalized"] = "pixels"
    """Format of the views: "normalized" for the networks' input, (B, 3, H, W) float32; "pixels" for (B, H, W, 3) uint8.
    "crops" ends the graph at the decoded shared crops, (height, width, 3) uint8 in their own sizes."""

    @property
    def decodes_on_gpu(self) -> bool:
        """Whether images are decoded on a GPU."""
        return self.device_id is not None and self.decode == "gpu"

    @property
    def pipeline_arguments(self) -> dict[str, Any]:
        """Keyword arguments of DALI's `Pipeline`."""
        return {
            "batch_size": self.max_batch_size,
            "num_threads": self.num_threads,
            "device_id": self.device_id,
            "prefetch_queue_depth": self.prefetch,
        }


def crop_parameters(windows: Windows) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of `CROP_INPUTS` after the encoded images."""
    return _corner_and_extent(windows.shared)


def _corner_and_extent(window: Float32[np.ndarray, "B 4"]) -> tuple[Int32[np.ndarray, "B 2"], Int32[np.ndarray, "B 2"]]:
    # DALI takes only contiguous arrays.
    return window[:, :2].astype(np.int32, order="C"), window[:, 2:].astype(np.int32, order="C")


def graph_parameters(draws: Draws, windows: Windows, settings: GraphSettings) -> tuple[np.ndarray, ...]:
    """Return the parameters of a batch in the order of the graph's inputs, which begin with the encoded images."""
    corner, extent = crop_parameters(windows)
    if settings.output == "crops":
        return corner, extent
    for operation in settings.views.operations:
        # Evaluations of such a run change nothing, and may use the graph.
        if operation.needs_plain_loader and any(
            operation.is_applied(parameters).any() for parameters in (draws.source, draws.target)
        ):
            raise ValueError(f"these settings of views.{operation.name} need runtime.loader=torch, got dali")
    # `source_flip` is relative to the target view, but the graph flips both views from the stored image.
    flip, source_flip = (flags.astype(np.int32) for flags in (draws.flip, draws.flip ^ draws.source_flip))
    source_corner, source_extent = _corner_and_extent(windows.source)
    # The source crop is cut out of the shared crop, which is decoded already.
    geometry = (source_corner - corner, source_extent, source_flip) if settings.views.has_source_geometry else ()
    changes = [
        values
        for parameters, is_source in ((draws.target, False), (draws.source, True))
        for step in _steps(settings.views, is_source=is_source)
        for values in _step_values(step, parameters, settings.views.size)
    ]
    return (corner, extent, flip, *geometry, *changes)


def _steps(views: ViewConfig, *, is_source: bool) -> list[tuple[PixelOperation, ...]]:
    """Return the steps of one view. A colour map is that of all its operations, with their parameters, in both."""
    steps = [step for step in views.steps if not step[0].needs_plain_loader]
    return [step for step in steps if is_source or step[0].is_linear or not step[0].is_source_only]


def _step_inputs(step: tuple[PixelOperation, ...]) -> dict[str, tuple[Any, int]]:
    """Return the inputs of a step: type and number of dimensions by name."""
    if step[0].is_linear:
        return _IS_APPLIED | _COLOR_MAP
    own = {name: (getattr(types, kind), dimensions) for name, (kind, dimensions) in step[0].dali_inputs.items()}
    return _IS_APPLIED | own


def _step_values(step: tuple[PixelOperation, ...], parameters: Parameters, size: int) -> tuple[np.ndarray, ...]:
    """Return the values of `_step_inputs`."""
    operation = step[0]
    if operation.is_linear:
        color_map = fused_color_map(step, parameters)
        return color_map.is_applied, *color_map
    values = operation.dali_values(parameters, size)
    return operation.is_applied(parameters), *(values[name] for name in operation.dali_inputs)


def build_graph(settings: GraphSettings, next_inputs: Callable[[], tuple[Any, ...]]) -> Pipeline:
    """Build the pipeline. It calls `next_inputs` once per batch, and may do so up to `prefetch` batches ahead.

    Its outputs are the source view and the target view, or with `output="crops"` the decoded crops.
    """
    build = _decoded_crops if settings.output == "crops" else _two_views
    graph = build(next_inputs, settings, **settings.pipeline_arguments)
    graph.build()
    return graph


def copy_view(view: Any, device: torch.device) -> Float32[torch.Tensor, "B 3 H W"]:
    """Copy a "normalized" output of a graph on a GPU into memory of torch, in the current CUDA stream of the GPU.

    Neither the host nor another stream waits for the copy; DALI keeps its memory until the copy is done.
    """
    copy = torch.empty(view.shape(), dtype=torch.float32, device=device)
    return feed_ndarray(view, copy, cuda_stream=torch.cuda.current_stream(device))


@pipeline_def
@no_type_check  # `pipeline_def` adds the arguments of `Pipeline` to the signature.
def _decoded_crops(next_inputs, settings):
    return decode_crop(input_nodes(CROP_INPUTS, next_inputs), settings)


@pipeline_def(enable_conditionals=True)
# DALI compiles the source code of this function again so that `if` splits a batch. Wrappers, such as those of
# jaxtyping's hook, would hide the code; `no_type_check` keeps them away.
@no_type_check
def _two_views(next_inputs, settings):
    data = input_nodes(view_inputs(settings), next_inputs)
    source_view, target_view = crop_nodes(data, settings)
    # Contrast scales about the mean of what the view shows, so views of the same region share one mean.
    target_gray = source_gray = None
    if has_gray_gain(settings):
        target_gray = gray_mean_nodes(target_view, settings)
        source_gray = gray_mean_nodes(source_view, settings) if settings.views.has_source_geometry else target_gray
    for condition, change in change_nodes(data, settings, target_gray, is_source=False):
        if condition:
            target_view = change(target_view)
    for condition, change in change_nodes(data, settings, source_gray, is_source=True):
        if condition:
            source_view = change(source_view)
    if settings.output == "normalized":
        source_view, target_view = [normalize_nodes(view, settings) for view in (source_view, target_view)]
    return source_view, target_view


# Plain Python on settings; `do_not_convert` excludes it from DALI's conversion of conditionals.
@do_not_convert
def view_inputs(settings):
    """Return the inputs that two views need: type and number of dimensions by name."""
    inputs = CROP_INPUTS | _FLIP | (_GEOMETRY if settings.views.has_source_geometry else {})
    for is_source in (False, True):
        for number, step in enumerate(_steps(settings.views, is_source=is_source)):
            inputs |= {_input_name(name, number, is_source): kind for name, kind in _step_inputs(step).items()}
    return inputs


def _input_name(name: str, number: int, is_source: bool) -> str:
    return f"{'source' if is_source else 'target'}_{number}_{name}"


@do_not_convert
def has_gray_gain(settings):
    """Return whether the first step of the views needs the grey mean of the crops."""
    steps = settings.views.steps
    return bool(steps) and steps[0][0].is_linear and steps[0][0].has_gray_gain


@do_not_convert
def change_nodes(data, settings, gray, *, is_source):
    """Return for each step of a view the node of its condition and a function that changes pixels."""
    changes = []
    for number, step in enumerate(_steps(settings.views, is_source=is_source)):
        inputs = {name: data[_input_name(name, number, is_source)] for name in _step_inputs(step)}
        # Arithmetic needs its operands on the device of the pixels; other arguments are taken from the CPU.
        on_device = ("gain",) if step[0].is_linear else step[0].dali_device_inputs
        if settings.device_id is not None:
            inputs |= {name: inputs[name].gpu() for name in on_device}
        if step[0].is_linear:
            change = partial(recolor_nodes, inputs=inputs, gray=gray if number == 0 else None, settings=settings)
        else:
            change = partial(step[0].apply_dali, dali, inputs=inputs)
        changes.append((inputs["is_applied"], do_not_convert(change)))
    return changes


def crop_nodes(data, settings):
    """Return nodes for the resized and flipped crops of source and target view."""
    size = settings.views.size
    pixels = decode_crop(data, settings)
    target = fn.flip(resize_to_square(pixels, size), horizontal=data["flip"])
    if not settings.views.has_source_geometry:
        return target, target
    pixels = fn.slice(pixels, start=data["source_corner"], shape=data["source_extent"], axes=[0, 1])
    return fn.flip(resize_to_square(pixels, size), horizontal=data["source_flip"]), target


@do_not_convert
def input_nodes(inputs, next_inputs):
    """Return nodes for the arrays that `next_inputs` returns, by name; `inputs` has their types and dimensions."""
    dtypes, dimensions = zip(*inputs.values(), strict=True)
    nodes = fn.external_source(
        source=next_inputs, num_outputs=len(inputs), batch=True, dtype=list(dtypes), ndim=list(dimensions)
    )
    return dict(zip(inputs, nodes, strict=True))


def decode_crop(data, settings):
    """Return a node for the decoded pixels of the crop, on the device of the graph.

    A CPU does not decode the rest of the image if its format allows that. A GPU decodes complete images.
    """
    window = {"start": data["corner"], "shape": data["extent"], "axes": [0, 1]}
    if settings.decodes_on_gpu:
        return crop_of_image(data["encoded"], window, device="mixed", **_gpu_decoder_options(settings))
    pixels = fn.decoders.image_slice(data["encoded"], **window, device="cpu")
    return pixels if settings.device_id is None else pixels.gpu()


def crop_of_image(encoded, window, **options):
    """Return a node for a crop of the decoded images: the same pixels as those of `fn.decoders.image_slice`.

    Decoding only the region on a GPU is reported to end the process, or to fail, with nvImageCodec 0.9.0
    (https://github.com/NVIDIA/nvImageCodec/issues/55). Not tried here.
    """
    return fn.slice(fn.decoders.image(encoded, **options), **window)


@do_not_convert
def _gpu_decoder_options(settings):
    # Chroma is upsampled like in libjpeg, which decodes on the CPU, so that both devices give the same pixels.
    options = {"jpeg_fancy_upsampling": True}
    if settings.hw_decoder_load is not None:
        options["hw_decoder_load"] = settings.hw_decoder_load
    if settings.preallocate is not None:
        options["preallocate_width_hint"], options["preallocate_height_hint"] = settings.preallocate
    return options


def resize_to_square(pixels, size):
    """Resize images to a square, with antialiasing."""
    return fn.resize(pixels, size=[size, size], interp_type=types.INTERP_LINEAR, antialias=True)


def gray_mean_nodes(pixels, settings):
    """Return a node for the mean luma of each image."""
    channel_means = fn.reductions.mean(pixels, axes=[0, 1], dtype=types.FLOAT)
    device = "cpu" if settings.device_id is None else "gpu"
    return fn.reductions.sum(channel_means * types.Constant(np.float32(LUMA), device=device))


def recolor_nodes(pixels, *, inputs, gray, settings):
    """Apply an affine colour map: matrix times pixel plus gain times grey mean, which is computed if it is None."""
    offset = inputs["gain"] * (gray_mean_nodes(pixels, settings) if gray is None else gray)
    # The cast from float to uint8 rounds and clamps.
    return fn.cast(fn.coord_transform(pixels, M=inputs["matrix"], dtype=types.FLOAT) + offset, dtype=types.UINT8)


def normalize_nodes(pixels, settings):
    """Normalise pixels like `normalization.normalize_view`."""
    mean, std = ([255 * value for value in values] for values in settings.normalization)
    return fn.crop_mirror_normalize(pixels, dtype=types.FLOAT, output_layout="CHW", mean=mean, std=std)
