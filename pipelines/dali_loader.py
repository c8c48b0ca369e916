"""The fast path: ranged reads in threads, DALI's graph, several batches ahead."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipelines.batch import Batch
from pipelines.dali_graph import GraphSettings, build_graph, graph_parameters
from pipelines.plan import EndOfPlanError, Plan, Request, assemble, undecodable
from pipelines.reader import Reader
from pipelines.shards import ShardSet
from pipelines.views import UNDECODABLE, decode_image


@dataclass(frozen=True, kw_only=True)
class _Planned:
    """A request whose bytes are being read."""

    request: Request
    parameters: tuple[Any, ...]
    reading: Future[list[np.ndarray]]


class DaliLoader:
    """Carries out a plan's requests, `settings.prefetch` batches ahead of the caller."""

    def __init__(
        self,
        plan: Plan,
        shards: ShardSet,
        *,
        first: int,
        settings: GraphSettings,
        reader_threads: int,
        device: torch.device,
    ) -> None:
        self._plan, self._shards, self._device = plan, shards, device
        self._settings = settings
        self._reader = Reader(shards, num_threads=reader_threads)
        self._planner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan")
        self._planned: deque[Future[_Planned]] = deque()
        self._in_graph: deque[Request] = deque()
        self._next = first
        # twice the graph's own queue: one half being read while the other is being rendered
        for _ in range(2 * settings.prefetch):
            self._plan_ahead()
        self._graph = build_graph(settings, self._feed)
        # a thread of its own runs the graph and assembles, so that the caller's time goes into training
        self._renderer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")
        self._ready = deque(self._renderer.submit(self._render) for _ in range(settings.prefetch))

    def _plan_ahead(self) -> None:
        self._planned.append(self._planner.submit(self._start_reading, self._next))
        self._next += 1

    def _start_reading(self, index: int) -> "_Planned":
        request = self._plan.request(index)
        reading = self._reader.submit(request.samples)
        return _Planned(request=request, parameters=graph_parameters(request.draws), reading=reading)

    def _feed(self) -> tuple[Any, ...]:
        """Hand the graph its next inputs; DALI calls this on the thread that runs it."""
        try:
            planned = self._planned.popleft().result()
        except EndOfPlanError:
            raise StopIteration from None
        self._plan_ahead()
        encoded = planned.reading.result()
        self._in_graph.append(planned.request)
        return encoded, *planned.parameters

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self._ready.popleft().result()
        self._ready.append(self._renderer.submit(self._render))
        return batch

    def _render(self) -> Batch:
        try:
            source_view, target_view, window = self._graph.run()
        except RuntimeError as error:
            raise self._name_the_culprit() from error
        request = self._in_graph.popleft()
        return assemble(
            request,
            self._shards,
            source_view=self._as_tensor(source_view),
            target_view=self._as_tensor(target_view),
            crop_window=np.array(window.as_tensor()),
            device=self._device,
        )

    def _as_tensor(self, outputs: Any) -> Tensor:
        if self._settings.device_id is None:
            # normalising copies these before DALI uses the buffer again
            return torch.from_numpy(np.array(outputs.as_tensor(), copy=False))
        return torch.from_dlpack(outputs.as_tensor())

    def _name_the_culprit(self) -> Exception:
        """Find the sample that broke the batch: DALI's message names the operator, not the file."""
        for request in self._in_graph:
            for sample, encoded in zip(request.samples, self._reader.read(request.samples), strict=True):
                try:
                    decode_image(encoded)
                except UNDECODABLE:
                    return undecodable(self._shards, int(sample), request.step)
        request = self._in_graph[0]
        return RuntimeError(
            f"DALI cannot render a batch of step {request.step}; runtime.loader=torch shows whether it can be"
        )

    def close(self) -> None:
        """Release threads, files and the graph."""
        self._renderer.shutdown(cancel_futures=True)
        self._planner.shutdown(cancel_futures=True)
        self._reader.close()
        del self._graph
