"""Two ways to leave operations out for some samples: DALI's conditional execution, as ours, or neutral parameters."""

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import cycle, islice
from typing import Any

import numpy as np

from benchmarks.harness import interleave
from benchmarks.harness.interleave import Stream
from benchmarks.harness.session import Case, Session, WrongResultError
from benchmarks.pipelines.dali_baselines import Feed, neutral_graph, neutral_parameters, runs
from benchmarks.pipelines.report import CONDITIONALS, OURS
from benchmarks.pipelines.streams import Workload, encoded_batches
from iwm_fast.pipelines.transforms.dali_graph import build_graph, graph_parameters
from iwm_fast.pipelines.transforms.parameters import Draws, draw

NEUTRAL = "always, with neutral parameters"
SHARE = 0.5
"""Of the time that is left."""
NUM_BATCHES = 8
"""Held in memory and shown over and over: only the graphs are compared."""


def run(session: Session, workload: Workload) -> None:
    """Check that both graphs make the same pixels, and time them."""
    with closing(encoded_batches(workload)) as batches:
        images = list(islice(batches, NUM_BATCHES))
    draws = [draw(workload.views, 0, step, np.arange(workload.batch_size)) for step in range(NUM_BATCHES)]
    streams = graph_streams(workload, images, draws)
    check(streams, _pixels)
    found = interleave.compare(streams, workload.turns, deadline=session.deadline_of(SHARE))
    for provider, result in found.items():
        interleave.note(session, Case(CONDITIONALS, workload.shape), provider, result)


def graph_streams(workload: Workload, images: list[list[np.ndarray]], draws: list[Draws]) -> dict[str, Stream]:
    """Return both graphs, fed with the same images and draws."""
    settings = workload.graph_settings

    def feed_of(parameters: Any) -> Feed:
        inputs = cycle([(encoded, *parameters(drawn)) for encoded, drawn in zip(images, draws, strict=True)])
        return lambda: next(inputs)

    def take(outputs: Any) -> int:
        if workload.device.type == "cuda":
            # the graph works in a stream of its own; copying a view waits for it
            outputs[0].as_cpu()
        return len(outputs[0])

    def ours() -> Iterator[Any]:
        return runs(build_graph(settings, feed_of(lambda drawn: graph_parameters(drawn, settings))))

    def neutral() -> Iterator[Any]:
        return runs(neutral_graph(settings, feed_of(neutral_parameters)))

    return {OURS: Stream(ours, take, ahead=2), NEUTRAL: Stream(neutral, take, ahead=2)}


def check(streams: dict[str, Stream], pixels_of: Callable[[Any], np.ndarray]) -> None:
    """Check that the graphs make the same views, bit for bit.

    Raises:
        WrongResultError: if they do not.
    """
    found = {}
    for name, stream in streams.items():
        with stream.open() as batches:
            found[name] = [pixels_of(view) for outputs in islice(batches, NUM_BATCHES) for view in outputs[:2]]
    for ours, theirs in zip(*found.values(), strict=True):
        if not np.array_equal(ours, theirs):
            raise WrongResultError(f"{CONDITIONALS}: neutral parameters give other pixels than leaving operations out")


def _pixels(view: Any) -> np.ndarray:
    return np.array((view.as_cpu() if hasattr(view, "as_cpu") else view).as_tensor())
