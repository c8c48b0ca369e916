"""Two ways to skip operations for some samples: DALI's conditional execution (our graph) or neutral parameters."""

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import cycle, islice
from typing import Any

import numpy as np

from benchmarks.harness import interleave
from benchmarks.harness.interleave import Stream
from benchmarks.harness.session import Case, Session, WrongResultError
from benchmarks.pipelines.dali_baselines import Feed, neutral_graph, neutral_parameters, run_forever
from benchmarks.pipelines.report import CONDITIONALS, OURS
from benchmarks.pipelines.streams import Workload, encoded_batches
from iwm_fast.pipelines.transforms.dali_graph import build_graph, graph_parameters
from iwm_fast.pipelines.transforms.parameters import Draws, draw

NEUTRAL = "always, with neutral parameters"
SHARE = 0.5
"""Share of the remaining time that this section may use."""
NUM_BATCHES = 8
"""Batches of encoded images that are held in memory and repeated, so that only the graphs are timed."""


def run(session: Session, workload: Workload) -> None:
    """Check that both graphs render the same pixels, and time them."""
    with closing(encoded_batches(workload)) as batches:
        images = list(islice(batches, NUM_BATCHES))
    draws = [draw(workload.views, 0, step, np.arange(workload.batch_size)) for step in range(NUM_BATCHES)]
    streams = graph_streams(workload, images, draws)
    check(streams, _to_numpy)
    results = interleave.compare(streams, workload.budget, deadline=session.deadline_of(SHARE))
    for provider, result in results.items():
        interleave.record(session, Case(CONDITIONALS, workload.shape), provider, result)


def graph_streams(workload: Workload, images: list[list[np.ndarray]], draws: list[Draws]) -> dict[str, Stream]:
    """Return streams of both graphs, which get the same images and draws."""
    settings = workload.graph_settings

    def feed_of(parameters: Any) -> Feed:
        inputs = cycle([(encoded, *parameters(drawn)) for encoded, drawn in zip(images, draws, strict=True)])
        return lambda: next(inputs)

    def consume(outputs: Any) -> int:
        if workload.device.type == "cuda":
            # DALI runs the graph in a CUDA stream of its own. A copy to the host waits for that stream.
            outputs[0].as_cpu()
        return len(outputs[0])

    def ours() -> Iterator[Any]:
        return run_forever(build_graph(settings, feed_of(lambda drawn: graph_parameters(drawn, settings))))

    def neutral() -> Iterator[Any]:
        return run_forever(neutral_graph(settings, feed_of(neutral_parameters)))

    return {OURS: Stream(ours, consume, prefetched=2), NEUTRAL: Stream(neutral, consume, prefetched=2)}


def check(streams: dict[str, Stream], pixels_of: Callable[[Any], np.ndarray]) -> None:
    """Raise WrongResultError unless both graphs render bit-equal views."""
    views = {}
    for name, stream in streams.items():
        with stream.open() as batches:
            views[name] = [pixels_of(view) for outputs in islice(batches, NUM_BATCHES) for view in outputs[:2]]
    for ours, neutral in zip(*views.values(), strict=True):
        if not np.array_equal(ours, neutral):
            raise WrongResultError(f"{CONDITIONALS}: neutral parameters change pixels that skipped operations do not")


def _to_numpy(view: Any) -> np.ndarray:
    return np.array((view.as_cpu() if hasattr(view, "as_cpu") else view).as_tensor())
