"""DALI graphs for comparison: DALI's reader, two views in DALI alone, and the first stages of our graph."""

# DALI's enums and graph nodes are typed too loosely for pyright.
# pyright: reportAttributeAccessIssue=false, reportOperatorIssue=false, reportArgumentType=false
# pyright: reportCallIssue=false, reportPrivateImportUsage=false, reportIndexIssue=false

from collections.abc import Callable, Generator, Sequence
from typing import Any, no_type_check

import nvidia.dali
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali.pipeline import Pipeline

from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.dali_graph import (
    CROP_INPUTS,
    GraphSettings,
    decode_crop,
    input_nodes,
    normalize_nodes,
)

Feed = Callable[[], tuple[Any, ...]]
"""Returns the next inputs of a graph."""

BUFFER = 1024
"""Size of the shuffle buffer of DALI's reader in samples, its default."""


def read_graph(paths: Sequence[str], index_paths: Sequence[str], batch_size: int) -> Pipeline:
    """Build DALI's reader, which shuffles as its documentation recommends and repeats the shards indefinitely."""
    graph = Pipeline(device_id=None, seed=0, batch_size=batch_size, num_threads=1)
    with graph:
        graph.set_outputs(_read(paths, index_paths))
    graph.build()
    return graph


def _read(paths: Sequence[str], index_paths: Sequence[str]) -> Any:
    """Return a node of DALI's reader."""
    return fn.readers.webdataset(
        paths=list(paths), index_paths=list(index_paths), ext=["jpg"], missing_component_behavior="error",
        random_shuffle=True, initial_fill=BUFFER, shuffle_after_epoch=True, seed=1,
    )  # fmt: skip


def views_graph(
    paths: Sequence[str], index_paths: Sequence[str], views: ViewConfig, settings: GraphSettings
) -> Pipeline:
    """Build a pipeline of DALI alone, as its documentation writes it: two normalised views with random operators.

    Parameters are drawn by DALI in the ranges of `views` and are not returned.
    """
    graph = _two_views(paths, index_paths, views, settings, seed=0, **settings.pipeline_arguments)
    graph.build()
    return graph


@pipeline_def(enable_conditionals=True)
@no_type_check  # DALI compiles the function's source code again, which a wrapper would hide.
def _two_views(paths, index_paths, views, settings):
    device = "cpu" if Pipeline.current().device_id is None else "mixed"
    crop = fn.decoders.image_random_crop(
        _read(paths, index_paths), device=device, random_area=views.crop.scale, random_aspect_ratio=views.crop.aspect
    )
    crop = fn.resize(crop, size=[views.size, views.size], antialias=True)
    crop = fn.flip(crop, horizontal=fn.random.coin_flip(probability=views.flip.probability))
    source, target = crop, crop
    if fn.random.coin_flip(probability=views.jitter.probability, dtype=types.BOOL):
        source = _jitter(source, views.jitter)
    if fn.random.coin_flip(probability=views.jitter.probability, dtype=types.BOOL):
        target = _jitter(target, views.jitter)
    if fn.random.coin_flip(probability=views.grayscale.probability, dtype=types.BOOL):
        source = fn.saturation(source, saturation=0.0)
    if fn.random.coin_flip(probability=views.blur.probability, dtype=types.BOOL):
        source = fn.gaussian_blur(source, sigma=fn.random.uniform(range=views.blur.sigma))
    if fn.random.coin_flip(probability=views.solarize.probability, dtype=types.BOOL):
        source = views.solarize.apply_dali(nvidia.dali, source, {})
    return normalize_nodes(source, settings), normalize_nodes(target, settings)


def _jitter(pixels, jitter):
    """Return a node for pixels with random brightness, contrast, saturation and hue."""
    ranges = {name: (1, getattr(jitter, name)) for name in ("brightness", "contrast", "saturation")}
    ranges["hue"] = 0, 360 * jitter.hue
    factors = {name: fn.random.uniform(range=[mean - delta, mean + delta]) for name, (mean, delta) in ranges.items()}
    return fn.color_twist(pixels, **factors)


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
