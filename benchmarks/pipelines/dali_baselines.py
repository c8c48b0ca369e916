"""DALI graphs for comparison: DALI's reader and the first stages of our graph."""

# DALI's enums and graph nodes are typed too loosely for pyright.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportIndexIssue=false

from collections.abc import Callable, Generator, Sequence
from typing import Any

from nvidia.dali import fn
from nvidia.dali.pipeline import Pipeline

from iwm_fast.pipelines.transforms.dali_graph import (
    CROP_INPUTS,
    GraphSettings,
    decode_crop,
    input_nodes,
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
    """Build the first stages of our graph: "decode" decodes full images, "crop" decodes the crop window.

    The inputs are encoded images and, for "crop", the corners and extents of the windows.
    """
    graph = Pipeline(**settings.pipeline_arguments)
    with graph:
        if stage == "decode":
            device = "cpu" if settings.device_id is None else "mixed"
            data = input_nodes({"encoded": CROP_INPUTS["encoded"]}, feed)
            graph.set_outputs(fn.decoders.image(data["encoded"], device=device))
        else:
            graph.set_outputs(decode_crop(input_nodes(CROP_INPUTS, feed), settings))
    graph.build()
    return graph


def run_forever(graph: Pipeline) -> Generator[Any]:
    """Yield the outputs of a graph, indefinitely."""
    while True:
        yield graph.run()
