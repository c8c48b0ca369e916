"""DALI graphs for comparison: DALI's reader, the first stages of our graph, and ours without conditional execution."""

# DALI's enums and graph nodes are typed too loosely for pyright.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportIndexIssue=false

from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from iwm_fast.pipelines.transforms.dali_graph import (
    GraphSettings,
    crop_window_nodes,
    decode_window,
    gray_mean_nodes,
    input_nodes,
    recolor_nodes,
    resize_to_square,
)
from iwm_fast.pipelines.transforms.parameters import Draws, blur_radius, color_matrix, gray_gain

Feed = Callable[[], tuple[Any, ...]]
"""Returns the next inputs of a graph."""

BUFFER = 1024
"""Size of the shuffle buffer of DALI's reader in samples, its default."""

_NEUTRAL = {
    "encoded": (types.UINT8, 1),
    "crop": (types.FLOAT, 1),
    "flip": (types.INT32, 0),
    "target_matrix": (types.FLOAT, 2),
    "target_gain": (types.FLOAT, 0),
    "source_matrix": (types.FLOAT, 2),
    "source_gain": (types.FLOAT, 0),
    "blur_sigma": (types.FLOAT, 0),
    "blur_window": (types.INT32, 0),
    "threshold": (types.INT32, 0),
}


def read_graph(paths: Sequence[str], index_paths: Sequence[str], **size: Any) -> Pipeline:
    """Build DALI's reader, which shuffles as its documentation recommends and repeats the shards indefinitely."""
    graph = Pipeline(device_id=None, seed=0, **size)
    with graph:
        encoded = fn.readers.webdataset(
            paths=list(paths),
            index_paths=list(index_paths),
            ext=["jpg"],
            missing_component_behavior="error",
            random_shuffle=True,
            initial_fill=BUFFER,
            shuffle_after_epoch=True,
            seed=1,
        )
        graph.set_outputs(encoded)
    graph.build()
    return graph


def build_stage(stage: str, settings: GraphSettings, feed: Feed) -> Pipeline:
    """Build the first stages of our graph: "decode" decodes full images, "crop" decodes and resizes the crop window.

    The inputs are encoded images and, for "crop", crop parameters.
    """
    inputs = {"encoded": (types.UINT8, 1)} | ({} if stage == "decode" else {"crop": (types.FLOAT, 1)})
    graph = Pipeline(**settings.pipeline_arguments)
    with graph:
        data = input_nodes(inputs, feed)
        if stage == "decode":
            device = "cpu" if settings.device_id is None else "mixed"
            graph.set_outputs(fn.decoders.image(data["encoded"], device=device))
        else:
            graph.set_outputs(_crop_nodes(data, settings))
    graph.build()
    return graph


def _crop_nodes(data: dict[str, Any], settings: GraphSettings) -> Any:
    window = crop_window_nodes(data["crop"], fn.peek_image_shape(data["encoded"], dtype=types.FLOAT))
    return resize_to_square(decode_window(data["encoded"], window, settings), settings.views.size)


def run_forever(graph: Pipeline) -> Generator[Any]:
    """Yield the outputs of a graph, indefinitely."""
    while True:
        yield graph.run()


def neutral_parameters(draws: Draws) -> tuple[np.ndarray, ...]:
    """Return the inputs of `neutral_graph`: an operation that was not drawn gets parameters that change no pixel.

    These are the identity matrix, a blur window of one pixel, and a solarization threshold above all values.
    """
    source, target = draws.source, draws.target
    color = (color_matrix(target), gray_gain(target), color_matrix(source), gray_gain(source))
    window = np.where(source.blur, 2 * blur_radius(source.blur_sigma) + 1, 1).astype(np.int32)
    threshold = np.where(source.solarize, 128, 256).astype(np.int32)
    return (draws.crop, draws.flip.astype(np.int32), *color, source.blur_sigma, window, threshold)


def neutral_graph(settings: GraphSettings, feed: Feed) -> Pipeline:
    """Build our graph so that all operations are executed for all samples."""
    graph = Pipeline(**settings.pipeline_arguments)
    is_gpu = settings.device_id is not None
    with graph:
        data = input_nodes(_NEUTRAL, feed)
        crop = fn.flip(_crop_nodes(data, settings), horizontal=data["flip"])
        gray = gray_mean_nodes(crop, is_gpu=is_gpu)
        gains = [data["target_gain"], data["source_gain"]]
        target_gain, source_gain = [gain.gpu() for gain in gains] if is_gpu else gains
        target = recolor_nodes(crop, data["target_matrix"], target_gain * gray)
        source = recolor_nodes(crop, data["source_matrix"], source_gain * gray)
        source = fn.gaussian_blur(source, sigma=data["blur_sigma"], window_size=data["blur_window"])
        threshold = data["threshold"].gpu() if is_gpu else data["threshold"]
        inverted = (source >= threshold) * (255 - 2 * fn.cast(source, dtype=types.INT32))
        graph.set_outputs(fn.cast(source + inverted, dtype=types.UINT8), target)
    graph.build()
    return graph
