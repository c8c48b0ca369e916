"""The fast loader: threads read byte ranges of shards and DALI renders the images, several batches ahead of training.

Four stages run at the same time, and each hands its results to the next in order:

    1. the "plan" thread computes requests and submits their reads
    2. the threads of `Reader` fetch encoded images
    3. the "render" thread runs the DALI graph, which asks for the inputs of its next batch, and assembles batches
    4. the caller of `__next__` trains
"""

import logging
import re
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from iwm_fast.pipelines.assemble import RenderedViews, assemble_batch
from iwm_fast.pipelines.bad_samples import BadSampleReplacer, error_as_value
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import LoaderConfig, Normalization
from iwm_fast.pipelines.sampling.batch_plan import BatchPlan, EndOfPlanError, Request
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.cpu_renderer import CpuRenderer
from iwm_fast.pipelines.transforms.dali_graph import GraphSettings, build_graph, copy_view, graph_parameters
from iwm_fast.pipelines.transforms.dali_rand_augment import augment_parameters, build_augment_graph
from iwm_fast.pipelines.transforms.geometry import Windows, view_windows
from iwm_fast.pipelines.transforms.image_decoding import DaliInput, as_ppm, dali_input, decode_image

log = logging.getLogger(__name__)

# In a message of DALI: the error is not about an image, so decoding the images elsewhere does not help.
_MEMORY_OR_GPU = re.compile(r"memory|alloc|CUDA (runtime|driver|error)|cudaError|CUDA_ERROR", re.IGNORECASE)
# A GPU's decoder counts as broken once it has failed on so many images; fewer may be odd files.
_MIN_FAILURES = 16


@dataclass(frozen=True)
class _LoadedRequest:
    """A request and its images, as DALI is given them."""

    request: Request
    images: list[DaliInput]

    @property
    def windows(self) -> Windows:
        """The regions of the images that the views show."""
        return view_windows(self.request.draws, np.array([image.shape for image in self.images]))


class DaliLoader:
    """Renders the micro-batches of a plan in order, `config.prefetch` batches ahead of the caller; see `Loader`."""

    def __init__(
        self,
        plan: BatchPlan,
        shards: ShardSet,
        config: LoaderConfig,
        device: torch.device,
        *,
        first: int,
        normalization: Normalization,
    ) -> None:
        self._plan = plan
        self._shards = shards
        self._device = device
        self._settings = graph_settings(plan, config, device, normalization)
        self._reader = Reader(shards, num_threads=config.reader_threads)
        self._prepare = error_as_value(partial(dali_input, max_pixels=shards.max_pixels))
        self._decode_and_prepare = error_as_value(self._checked_input)
        self._replacer = BadSampleReplacer(
            plan, shards, self._reader, config.max_bad_samples, prepare_candidate=self._decode_and_prepare
        )
        # Samples that DALI cannot decode though Pillow can.
        self._left_to_pillow: set[int] = set()
        # Of the batches since DALI last rendered one at the first try: all images, and those that it could not decode.
        self._num_tried = self._num_failed = 0
        # Masks and draws of a request take time too, so a separate thread computes them.
        self._planner = ThreadPoolExecutor(max_workers=1, thread_name_prefix="plan")
        self._pending_reads: deque[Future[tuple[Request, Future[list[Any]]]]] = deque()
        # Requests whose inputs the graph has taken and whose outputs it has not returned yet, in order.
        self._in_graph: deque[_LoadedRequest] = deque()
        self._next_index = first
        for _ in range(config.prefetch + config.read_ahead):
            self._submit_next_request()
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._graph = self._build_graph(self._settings, self._next_inputs)
        self._retry_graph: Any = None
        self._retry_inputs: tuple[Any, ...] = ()
        is_cropping = self._settings.output == "crops"
        self._cpu_renderer = CpuRenderer(plan.views, config.loader_threads, normalization) if is_cropping else None
        # A separate thread runs the graph and assembles batches, so that the caller's time goes into training. The
        # current device of a new thread is GPU 0, on which every rank would take memory for a CUDA context.
        use_device = partial(torch.cuda.set_device, self._settings.device_id) if self._stream is not None else None
        self._renderer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="render", initializer=use_device)
        self._pending_batches = deque(self._renderer.submit(self._render_next_batch) for _ in range(config.prefetch))

    def _build_graph(self, settings: GraphSettings, next_inputs: Callable[[], tuple[Any, ...]]) -> Any:
        if self._plan.augment is not None:
            return build_augment_graph(settings, self._plan.augment, next_inputs)
        return build_graph(settings, next_inputs)

    def _submit_next_request(self) -> None:
        self._pending_reads.append(self._planner.submit(self._start_reading, self._next_index))
        self._next_index += 1

    def _start_reading(self, index: int) -> tuple[Request, Future[list[Any]]]:
        request = self._plan.request(index)
        return request, self._reader.submit(request.samples, self._prepare)

    def _next_inputs(self) -> tuple[Any, ...]:
        """Return the graph's next inputs. `schedule_run` calls this on the render thread, up to `prefetch` ahead."""
        try:
            request, reading = self._pending_reads.popleft().result()
        except EndOfPlanError:
            # DALI's external source ends at StopIteration; `outputs` raises it after the last prefetched batch.
            raise StopIteration from None
        self._submit_next_request()
        request, images = self._replacer.replace(request, reading.result())
        for image in np.flatnonzero(np.isin(request.samples, list(self._left_to_pillow))):
            images[image] = self._decoded_by_pillow(images[image])
        loaded = _LoadedRequest(request, images)
        inputs = self._graph_inputs(loaded)
        self._in_graph.append(loaded)
        return inputs

    def _graph_inputs(self, loaded: _LoadedRequest) -> tuple[Any, ...]:
        draws, augment = loaded.request.draws, loaded.request.augment
        encoded = [image.encoded for image in loaded.images]
        if augment is not None:
            return encoded, *augment_parameters(draws, loaded.windows, augment)
        return encoded, *graph_parameters(draws, loaded.windows, self._settings)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch, rendering_done = self._pending_batches.popleft().result()
        self._pending_batches.append(self._renderer.submit(self._render_next_batch))
        if rendering_done is not None:
            # Only the GPU waits for the rendering, not the host. `record_stream` keeps torch's allocator from reusing
            # the memory, which belongs to the rendering stream, before the training stream has read it.
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(rendering_done)
            for tensor in batch.tensors_on_device():
                tensor.record_stream(stream)
        return batch

    def _render_next_batch(self) -> tuple[Batch, torch.Event | None]:
        """Render and assemble a batch; on a GPU in a separate CUDA stream, so that it overlaps with training.

        Returns:
            The batch, and on a GPU the event after which its tensors may be read.
        """
        if self._stream is None:
            return self._render(), None
        with torch.cuda.stream(self._stream):
            batch = self._render()
            return batch, self._stream.record_event()

    def _render(self) -> Batch:
        # Not in the `try`: it computes and feeds a later batch, and an error of that says nothing about this one.
        self._graph.schedule_run()
        try:
            outputs = self._outputs(self._graph)
        except RuntimeError as error:
            # DALI raises RuntimeError for the complete batch if one of its images cannot be decoded.
            outputs = self._run_again(error)
        else:
            self._num_tried = self._num_failed = 0
        loaded = self._in_graph.popleft()
        request, windows = loaded.request, loaded.windows
        if self._cpu_renderer is None:
            source_view, target_view = (self._as_tensor(view.as_tensor()) for view in outputs)
        else:
            (crops,) = outputs
            crops = [self._as_tensor(crops[image]) for image in range(len(crops))]
            source_view, target_view = self._cpu_renderer.views(crops, windows, request.draws)
        rendered = RenderedViews(source_view=source_view, target_view=target_view, windows=windows)
        return assemble_batch(request, rendered, self._shards, self._plan.views, self._device)

    def _outputs(self, graph: Any) -> tuple[Any, ...]:
        return graph.outputs() if self._stream is None else graph.outputs(self._stream)

    def _run_again(self, error: RuntimeError) -> tuple[Any, ...]:
        """Render the batch that failed once more: without bad samples, and with images decoded by Pillow if need be.

        The main graph cannot repeat a batch: after an error it continues with the next one. A second graph, which does
        not prefetch, renders the batch.

        Raises:
            RuntimeError: `error`, if it is about memory or the GPU; otherwise one that names the images, if the batch
                cannot be rendered even though Pillow has decoded those that DALI cannot, or that names runtime.decode,
                if a GPU's decoder seems to be broken.
        """
        # Outputs come in the order of the inputs, so the batch that failed is the oldest one in the graph.
        failed = self._in_graph[0]
        checked = [self._decode_and_prepare(image.encoded) for image in failed.images]
        request, images = self._replacer.replace(failed.request, checked)
        has_bad_samples = request is not failed.request
        # A damaged image may ask for any amount of memory; if it was the cause, rendering the others succeeds.
        if _MEMORY_OR_GPU.search(_reason(error)) and not has_bad_samples:
            raise error
        self._in_graph[0] = loaded = _LoadedRequest(request, images)
        inputs = self._graph_inputs(loaded)
        undecodable: dict[int, str] = {}
        for image, sample in enumerate(request.samples.tolist()):
            alone = self._retry(tuple(values[image : image + 1] for values in inputs))
            if isinstance(alone, RuntimeError):
                undecodable[sample] = _reason(alone)
                images[image] = self._decoded_by_pillow(images[image])
        outputs = self._retry(self._graph_inputs(loaded))
        if isinstance(outputs, RuntimeError):
            first, last = (self._shards.address(int(request.samples[image])) for image in (0, -1))
            raise RuntimeError(
                f"DALI cannot render a batch of step {request.step} ({_reason(error)}) though each of its images, "
                f"{first} to {last}, can be decoded; set runtime.loader=torch to find out whether DALI is the cause"
            ) from error
        # Only now is it certain that decoding was the cause: other defects of DALI or the GPU would have failed again.
        self._check_decoder(len(images), list(undecodable.values()))
        for sample in undecodable.keys() - self._left_to_pillow:
            message = "DALI cannot decode %s; Pillow decodes it instead (%s)"
            log.warning(message, self._shards.address(sample), undecodable[sample])
        self._left_to_pillow |= undecodable.keys()
        if not undecodable and not has_bad_samples:
            log.warning("DALI rendered a batch of step %d only at the second try (%s)", request.step, _reason(error))
        return outputs

    def _check_decoder(self, num_tried: int, failures: list[str]) -> None:
        """Raise RuntimeError if the GPU's decoder, and not the files, seems to be the cause of the failures.

        What Pillow has decoded is decoded again on the CPU, so with a broken decoder, too, the second try succeeds. But
        then most images fail, in batch after batch.
        """
        self._num_tried += num_tried
        self._num_failed += len(failures)
        if self._settings.decodes_on_gpu and self._num_failed >= max(_MIN_FAILURES, self._num_tried / 2):
            raise RuntimeError(
                f"the GPU failed to decode {self._num_failed} of the last {self._num_tried} images, which Pillow "
                f"decodes ({failures[0]}); set runtime.decode=cpu, or runtime.loader=torch"
            )

    def _retry(self, inputs: tuple[Any, ...]) -> tuple[Any, ...] | RuntimeError:
        """Return the outputs of the second graph, or its error; one about memory or the GPU is raised."""
        self._retry_inputs = inputs
        if self._retry_graph is None:
            self._retry_graph = self._build_graph(replace(self._settings, prefetch=1), lambda: self._retry_inputs)
        self._retry_graph.schedule_run()
        try:
            return self._outputs(self._retry_graph)
        except RuntimeError as error:
            if _MEMORY_OR_GPU.search(_reason(error)):
                raise
            return error

    def _as_tensor(self, output: Any) -> Tensor:
        """Return an output of DALI as a tensor, whose memory nothing else uses."""
        if self._stream is None:
            # Not a copy: DALI allocates new memory for the outputs of each batch.
            return torch.from_dlpack(output)
        # DALI's own memory would cost a synchronisation of the device whenever a batch is freed, and `record_stream`
        # knows torch's memory only.
        return copy_view(output, self._device)

    def _checked_input(self, encoded: UInt8[np.ndarray, "_"]) -> DaliInput:
        """Return what DALI is given for an image, after Pillow has decoded it."""
        decode_image(encoded, self._shards.max_pixels)
        return dali_input(encoded, self._shards.max_pixels)

    def _decoded_by_pillow(self, image: DaliInput) -> DaliInput:
        return as_ppm(decode_image(image.encoded, self._shards.max_pixels))

    def close(self) -> None:
        """Stop the threads, close the files and free the graphs."""
        # The render thread uses all that follows, so it ends first.
        self._renderer.shutdown(cancel_futures=True)
        self._planner.shutdown(cancel_futures=True)
        if self._cpu_renderer is not None:
            self._cpu_renderer.close()
        self._reader.close()
        del self._graph, self._retry_graph


def _reason(error: RuntimeError) -> str:
    """Return what DALI says happened, in one line, without the line of Python that defined the operator."""
    text = str(error).rpartition("encountered:")[2].partition("Stacktrace")[0]
    return " ".join(text.replace("Current pipeline object is no longer valid.", "").split()).rstrip(" :")


def graph_settings(
    plan: BatchPlan, config: LoaderConfig, device: torch.device, normalization: Normalization
) -> GraphSettings:
    """Return the settings of the DALI graph for a plan, a loader configuration, a device and a normalisation."""
    is_on_gpu = device.type == "cuda"
    return GraphSettings(
        views=plan.views,
        max_batch_size=plan.max_batch_size,
        num_threads=config.loader_threads,
        prefetch=config.prefetch,
        device_id=device.index or 0 if is_on_gpu else None,
        decode=config.decode,
        hw_decoder_load=config.hw_decoder_load,
        preallocate=config.decoder_preallocate,
        normalization=normalization,
        # On a CPU the graph ends at the crops, because `CpuRenderer` is faster than DALI's CPU operators
        # (benchmarks/README.md). RandAugment exists only in DALI, so its graph renders the complete view.
        output="normalized" if is_on_gpu or plan.augment is not None else "crops",
    )
