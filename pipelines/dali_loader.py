"""The fast path: ranged reads in threads, DALI's graph, several batches ahead."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from iwm_fast.pipelines.assemble import RenderedViews, assemble
from iwm_fast.pipelines.bad_samples import BadSampleReplacer, Encoded
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import LoaderConfig
from iwm_fast.pipelines.sampling.batch_plan import BatchPlan, EndOfPlanError, Request
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.cpu_renderer import CpuPhotometry
from iwm_fast.pipelines.transforms.dali_graph import GraphSettings, build_graph, graph_parameters
from iwm_fast.pipelines.transforms.dali_rand_augment import augment_parameters, build_augment_graph


@dataclass(frozen=True, kw_only=True)
class _Read:
    """A request and the images it shows."""

    request: Request
    encoded: list[Encoded]


class DaliLoader:
    """Carries out a plan's requests, `config.prefetch` batches ahead of the caller."""

    def __init__(
        self, plan: BatchPlan, shards: ShardSet, config: LoaderConfig, device: torch.device, *, first: int = 0
    ) -> None:
        self._plan, self._shards, self._device = plan, shards, device
        self._settings = graph_settings(plan, config, device)
        self._reader = Reader(shards, num_threads=config.reader_threads)
        self._replacer = BadSampleReplacer(plan, shards, self._reader, config.max_bad_samples)
        self._planner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan")
        self._planned: deque[Future[tuple[Request, Future[list[Encoded]]]]] = deque()
        self._in_graph: deque[_Read] = deque()
        self._next = first
        for _ in range(config.prefetch + config.read_ahead):
            self._plan_ahead()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._graph = self._build(self._settings, self._feed)
        self._spare_graph: Any = None
        is_cropping = self._settings.output == "crops"
        self._photometry = CpuPhotometry(config.loader_threads) if is_cropping else None
        # a thread of its own runs the graph and assembles, so that the caller's time goes into training
        self._renderer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render")
        self._ready = deque(self._renderer.submit(self._next_batch) for _ in range(config.prefetch))

    def _build(self, settings: GraphSettings, next_inputs: Callable[[], tuple[Any, ...]]) -> Any:
        if self._plan.augment is not None:
            return build_augment_graph(settings, self._plan.augment, next_inputs)
        return build_graph(settings, next_inputs)

    def _plan_ahead(self) -> None:
        self._planned.append(self._planner.submit(self._start_reading, self._next))
        self._next += 1

    def _start_reading(self, index: int) -> tuple[Request, Future[list[Encoded]]]:
        request = self._plan.request(index)
        return request, self._reader.submit(request.samples)

    def _feed(self) -> tuple[Any, ...]:
        """Hand the graph its next inputs; DALI calls this on the thread that runs it."""
        try:
            request, reading = self._planned.popleft().result()
        except EndOfPlanError:
            raise StopIteration from None
        self._plan_ahead()
        request, encoded = self._replacer.screen(request, reading.result())
        self._in_graph.append(_Read(request=request, encoded=encoded))
        return self._inputs(self._in_graph[-1])

    def _inputs(self, read: _Read) -> tuple[Any, ...]:
        draws, augment = read.request.draws, read.request.augment
        if augment is not None:
            return read.encoded, *augment_parameters(draws, augment)
        return read.encoded, *graph_parameters(draws, self._settings)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, is_ready = self._ready.popleft().result()
        self._ready.append(self._renderer.submit(self._next_batch))
        if is_ready is not None:
            # training waits on the GPU, not on the host; the memory is free again once training has used it
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(is_ready)
            for tensor in batch.tensors_on_device():
                tensor.record_stream(stream)
        return batch

    def _next_batch(self) -> tuple[Batch, torch.Event | None]:
        """Render and assemble; on a GPU in a stream of its own, so that it overlaps with training."""
        if self._stream is None:
            return self._render(), None
        with torch.cuda.stream(self._stream):
            batch = self._render()
            return batch, self._stream.record_event()

    def _render(self) -> Batch:
        try:
            outputs = self._run(self._graph)
        except RuntimeError:
            outputs = self._run_without_bad_samples()
        request = self._in_graph.popleft().request
        *shown, window, inner = outputs
        source_view, target_view = (self._as_tensor(view) for view in shown)
        if self._photometry is not None:
            if not self._plan.views.has_source_geometry:
                source_view = target_view
            source_view, target_view = self._photometry.views(source_view, target_view, request.draws)
        rendered = RenderedViews(
            source_view=source_view,
            target_view=target_view,
            crop_window=np.array(window.as_tensor()),
            source_window=np.array(inner.as_tensor()),
        )
        return assemble(request, rendered, self._shards, self._plan.views, self._device)

    def _run(self, graph: Any) -> tuple[Any, ...]:
        return graph.run() if self._stream is None else graph.run(self._stream)

    def _run_without_bad_samples(self) -> tuple[Any, ...]:
        """Render the batch that failed once more, in a graph of its own: the first has gone on to the next one."""
        failed = self._in_graph[0]
        request, encoded = self._replacer.search(failed.request, failed.encoded)
        self._in_graph[0] = _Read(request=request, encoded=encoded)
        if self._spare_graph is None:
            settings = replace(self._settings, prefetch=1)
            self._spare_graph = self._build(settings, lambda: self._inputs(self._in_graph[0]))
        return self._run(self._spare_graph)

    def _as_tensor(self, outputs: Any) -> Tensor:
        """Hand over a view without copying; the graph makes new memory for its next batch."""
        return torch.from_dlpack(outputs.as_tensor())

    def close(self) -> None:
        """Release threads, files and the graphs."""
        self._renderer.shutdown(cancel_futures=True)
        self._planner.shutdown(cancel_futures=True)
        if self._photometry is not None:
            self._photometry.close()
        self._reader.close()
        del self._graph, self._spare_graph


def graph_settings(plan: BatchPlan, config: LoaderConfig, device: torch.device) -> GraphSettings:
    """Return what a plan's graph is built from."""
    is_on_gpu = device.type == "cuda"
    return GraphSettings(
        views=plan.views,
        max_batch_size=plan.max_batch_size,
        num_threads=config.loader_threads,
        prefetch=config.prefetch,
        device_id=device.index or 0 if is_on_gpu else None,
        hw_decoder_load=config.hw_decoder_load,
        preallocate=config.decoder_preallocate,
        # RandAugment is DALI's; views are made in the graph on a GPU, after it on a CPU
        output="normalized" if is_on_gpu or plan.augment is not None else "crops",
    )
