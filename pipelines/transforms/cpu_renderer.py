"""Resizing, photometric transformations and normalisation on a CPU, after a DALI graph that ends at the decoded crops.

The result is that of `torch_renderer` and `normalization.normalize_view`, except for rounding: resizing in 8 bits gives
at most one grey level more or less, and the photometric transformations are not rounded to levels in between.
One image after the other is processed by a thread in memory that it uses again, so that the pixels stay in its cache.
DALI's CPU operators take several times as long (benchmarks/README.md). On a GPU the DALI graph does this.
"""

import threading
import weakref
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor

from iwm_fast.pipelines.config import Normalization
from iwm_fast.pipelines.transforms.base import Levels, Parameters, PixelOperation
from iwm_fast.pipelines.transforms.color_map import LUMA, ColorMap
from iwm_fast.pipelines.transforms.composition import Draws, ViewConfig, fused_color_map
from iwm_fast.pipelines.transforms.geometry import Windows
from iwm_fast.pipelines.transforms.normalization import denormalize_view, normalize_view, scale_and_shift
from iwm_fast.pipelines.transforms.torch_renderer import recolor


class CpuRenderer:
    """Renders two normalised views from decoded crops, in `num_threads` threads."""

    def __init__(self, views: ViewConfig, num_threads: int, normalization: Normalization) -> None:
        self._size = views.size
        self._steps = views.steps
        self._has_source_geometry = views.has_source_geometry
        self._pool = _single_threaded_pool(num_threads)
        self._num_threads = num_threads
        self._normalization = normalization
        self._memory = RecycledMemory()
        self._thread_local = threading.local()

    def views(
        self, crops: Sequence[UInt8[Tensor, "_ _ 3"]], windows: Windows, draws: Draws
    ) -> tuple[Float32[Tensor, "B 3 S S"], Float32[Tensor, "B 3 S S"]]:
        """Return source and target view; `crops` has the pixels of the shared crops in their own sizes."""
        shape = (len(crops), 3, self._size, self._size)
        source_flip = draws.flip ^ draws.source_flip
        source = _View(self._steps, draws.source, source_flip, self._normalization, pixels=self._memory.take(shape))
        target = _View(self._steps, draws.target, draws.flip, self._normalization, pixels=self._memory.take(shape))
        # The region of the source view in the shared crop.
        regions = np.concatenate([windows.source[:, :2] - windows.shared[:, :2], windows.source[:, 2:]], axis=1)
        regions = regions.astype(int).tolist()

        def render(first: int) -> None:
            scratch = self._scratch()
            for image in range(first, len(crops), self._num_threads):
                crop = crops[image]
                scratch.load(crop, is_flipped=target.is_flipped[image])
                scratch.render(target, image)
                if self._has_source_geometry:
                    top, left, height, width = regions[image]
                    region = crop[top : top + height, left : left + width]
                    scratch.load(region, is_flipped=source.is_flipped[image])
                scratch.render(source, image)

        # Consuming the results waits for all threads and raises their errors.
        for _ in self._pool.map(render, range(self._num_threads)):
            pass
        return source.pixels, target.pixels

    def _scratch(self) -> "_Scratch":
        """Return the calling thread's scratch memory."""
        scratch = getattr(self._thread_local, "scratch", None)
        if scratch is None:
            scratch = self._thread_local.scratch = _Scratch(self._size, self._normalization)
        return scratch

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)


def _single_threaded_pool(num_workers: int) -> ThreadPoolExecutor:
    """Return a pool in whose threads torch's operations use one thread each, whatever the caller's setting is.

    Otherwise every thread would start as many as OMP_NUM_THREADS or the number of cores, which wait for each other by
    spinning.
    """
    pool, started = ThreadPoolExecutor(num_workers, thread_name_prefix="cpu-renderer"), threading.Barrier(num_workers)

    def start() -> None:
        # The first use of torch in a thread adopts the value that was set last, by whichever thread.
        torch.get_num_threads()
        torch.set_num_threads(1)
        # A thread that waits takes no second job, so that all of them are started.
        started.wait()

    num_threads = torch.get_num_threads()
    for job in [pool.submit(start) for _ in range(num_workers)]:
        job.result()
    # For the threads that start later.
    torch.set_num_threads(num_threads)
    return pool


class RecycledMemory:
    """Allocates tensors whose memory is used again after the last reference to them is gone.

    malloc returns memory blocks of a batch's size to the operating system. A new block consists of pages that the
    kernel fills with zeros on first access, which takes as long as the photometric transformations themselves.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)

    def take(self, shape: tuple[int, ...]) -> Float32[Tensor, "..."]:
        """Return an uninitialised tensor of this shape."""
        free = self._free[shape]
        block = free.pop() if free else np.empty(shape, np.float32)
        # `from_numpy` keeps a reference to this view object until the last tensor with its memory is gone, also one
        # that autograd saved. The finalizer then returns the block.
        lease = block[...]
        weakref.finalize(lease, free.append, block).atexit = False
        return torch.from_numpy(lease)


class _Recoloring:
    """The colour maps of B images as maps to normalised pixels, split by image."""

    def __init__(self, color_map: ColorMap, normalization: Normalization) -> None:
        self.is_applied: list[bool] = color_map.is_applied.tolist()
        self.gain: list[float] = color_map.gray_gain.tolist()
        # Maps red, green, blue and 1 to normalised red, green and blue, but for the grey mean. The fourth row is not
        # used: it puts the matrices of all images at addresses of equal alignment, so that they are multiplied alike.
        padded = torch.zeros(len(self.gain), 4, 4)
        self.matrices = padded[:, :3].unbind()
        scale, shift = (values.view(3, 1).numpy() for values in scale_and_shift(normalization))
        padded.numpy()[:, :3] = np.concatenate(
            [scale * color_map.matrix, np.broadcast_to(-shift, (len(padded), 3, 1))], axis=2, dtype=np.float32
        )
        self.offsets: list[np.ndarray] = list(padded.numpy()[:, :3, 3])


class _Change:
    """A step that changes normalised planes: the images that it is applied to, and its parameters by image."""

    def __init__(self, step: tuple[PixelOperation, ...], parameters: Parameters, normalization: Normalization) -> None:
        self._step = step
        self._parameters = parameters
        self._normalization = normalization
        is_linear = step[0].is_linear
        is_applied = fused_color_map(step, parameters).is_applied if is_linear else step[0].is_applied(parameters)
        self.is_applied: list[bool] = is_applied.tolist()

    def apply(self, planes: Float32[Tensor, "3 S S"], image: int, levels: Levels) -> None:
        """Change the planes of an image in place."""
        operation, parameters = self._step[0], self._parameters
        if operation.is_fast_on_cpu:
            own = {name: values[image].item() for name, values in parameters.items()}
            operation.apply_planes(torch, planes, own, levels)
            return
        # What has no fast form is left to the reference.
        alone = {name: values[image : image + 1] for name, values in parameters.items()}
        pixels = denormalize_view(planes[None], self._normalization)
        if operation.is_linear:
            pixels = recolor(pixels, fused_color_map(self._step, alone))
        else:
            pixels = operation.apply(torch, pixels, alone)
        planes.copy_(normalize_view(pixels, self._normalization)[0])


class _View:
    """What is done to the images of one view, and the memory for its pixels.

    Everything is split by image in advance, with few operations: each of torch's operations releases Python's lock, and
    threads that take turns at it lose more time than a short operation takes.
    """

    def __init__(
        self,
        steps: tuple[tuple[PixelOperation, ...], ...],
        parameters: Parameters,
        is_flipped: Bool[np.ndarray, "B"],
        normalization: Normalization,
        *,
        pixels: Float32[Tensor, "B 3 S S"],
    ) -> None:
        self.pixels = pixels
        self.images = pixels.unbind()
        self.is_flipped: list[bool] = is_flipped.tolist()
        # A colour map that comes first is applied together with the normalisation.
        is_first_linear = bool(steps) and steps[0][0].is_linear
        color_map = fused_color_map(steps[0], parameters) if is_first_linear else None
        self.recoloring = None if color_map is None else _Recoloring(color_map, normalization)
        self.changes = [_Change(step, parameters, normalization) for step in steps[is_first_linear:]]


class _Scratch:
    """Memory of one thread for one image: an 8-bit crop of the size of the views, and float32 planes."""

    def __init__(self, size: int, normalization: Normalization) -> None:
        self._size = [size, size]
        # `interpolate` takes and returns uint8 with interleaved channels, as DALI decodes it.
        self._resized = torch.empty(1, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
        # Red, green, blue and 1, so that one matrix product multiplies and adds.
        self._planes = torch.ones(4, size * size)
        self._colors = self._planes[:3].view(3, size, size)
        self._recolored = torch.empty(3, size * size)
        self._channels = self._recolored.view(3, size, size).unbind()
        self._gray_mean = 0.0
        self._scale, self._shift = scale_and_shift(normalization)
        self._scale_of_channel = self._scale.flatten().numpy()
        black, white = -self._shift, 255 * self._scale - self._shift
        self._levels = Levels(black, white, scratch=self._recolored.view(3, size, size))
        self._limits = list(zip(black.flatten().tolist(), white.flatten().tolist(), strict=True))

    def load(self, crop: UInt8[Tensor, "_ _ 3"], *, is_flipped: bool) -> None:
        """Resize and flip a crop, and convert it to planes."""
        # `interpolate`, which calls this operation, does not write to memory of the caller's.
        torch.ops.aten._upsample_bilinear2d_aa.out(crop.permute(2, 0, 1)[None], self._size, False, out=self._resized)
        self._colors.copy_((self._resized.flip(3) if is_flipped else self._resized)[0])
        means = self._colors.mean(dim=(1, 2)).tolist()
        self._gray_mean = sum(weight * mean for weight, mean in zip(LUMA, means, strict=True))

    def render(self, view: _View, image: int) -> None:
        """Render the loaded crop with the parameters of an image and write the result to the view's memory."""
        pixels, recoloring = view.images[image], view.recoloring
        if recoloring is not None and recoloring.is_applied[image]:
            recoloring.offsets[image] += self._scale_of_channel * (recoloring.gain[image] * self._gray_mean)
            torch.mm(recoloring.matrices[image], self._planes, out=self._recolored)
            for plane, channel, limits in zip(self._channels, pixels.unbind(), self._limits, strict=True):
                torch.clamp(plane, *limits, out=channel)
        else:
            torch.mul(self._colors, self._scale, out=pixels).sub_(self._shift)
        for change in view.changes:
            if change.is_applied[image]:
                change.apply(pixels, image, self._levels)
