"""DALI graphs for comparison: DALI's reader and the first stages of our graph."""

# DALI's enums and graph nodes are typed too loosely for pyright.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportIndexIssue=false

from collections.abc import Callable, Generator, Sequence
from typing import Any

from nvidia.dali import fn, types
from nvidia.dali.pipeline import Pipeline

from iwm_fast.pipelines.transforms.dali_graph import (
    GraphSettings,
    crop_window_nodes,
    decode_window,
    input_nodes,
    resize_to_square,
)

Feed = Callable[[], tuple[Any, ...]]
"""Returns the next inputs of a graph."""

BUFFER = 1024
"""Size of the shuffle buffer of DALI's reader in samples, its default."""


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
