"""Photometric transformations and normalisation on a CPU, used after a DALI graph that ends at the crops.

Equal to `torch_renderer.render` followed by `normalization.normalize_view`, except for rounding. It processes one image
at a time in float32 planes, so that the image stays in the processor's cache. DALI's CPU operators, which work on
single values, take twice as long (benchmarks/README.md). On a GPU the DALI graph performs these operations itself.
"""

import threading
import weakref
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor
from torch.nn import functional

from iwm_fast.pipelines.config import Normalization
from iwm_fast.pipelines.transforms.normalization import scale_and_shift
from iwm_fast.pipelines.transforms.parameters import LUMA, Draws, Photometry, blur_radius, color_matrix, gray_gain


class CpuPhotometry:
    """Renders two normalised views from crops, in `num_threads` threads."""

    def __init__(self, num_threads: int, normalization: Normalization) -> None:
        self._pool = _single_threaded_pool(num_threads)
        self._num_threads = num_threads
        self._normalization = normalization
        self._memory = RecycledMemory()
        self._thread_local = threading.local()

    def views(
        self, source_crop: UInt8[Tensor, "B S S 3"], target_crop: UInt8[Tensor, "B S S 3"], draws: Draws
    ) -> tuple[Float32[Tensor, "B 3 S S"], Float32[Tensor, "B 3 S S"]]:
        """Return source and target view; pass the same tensor twice if both are rendered from the same crop."""
        batch, height, width, _ = target_crop.shape
        jobs = [
            (_ViewParameters(draws.source), source_crop, self._memory.take((batch, 3, height, width))),
            (_ViewParameters(draws.target), target_crop, self._memory.take((batch, 3, height, width))),
        ]

        def render(first: int) -> None:
            scratch = self._scratch(height * width)
            for image in range(first, batch, self._num_threads):
                # Both views of an image are rendered together, since a shared crop then has to be converted only once.
                loaded = None
                for parameters, crop, views in jobs:
                    if crop is not loaded:
                        scratch.load(crop[image])
                        loaded = crop
                    scratch.render(parameters, image, views[image])

        # Consuming the results waits for all threads and raises their errors.
        for _ in self._pool.map(render, range(self._num_threads)):
            pass
        (_, _, source_view), (_, _, target_view) = jobs
        return source_view, target_view

    def _scratch(self, num_pixels: int) -> "_Scratch":
        """Return the calling thread's scratch memory."""
        scratch = getattr(self._thread_local, "scratch", None)
        if scratch is None or scratch.num_pixels != num_pixels:
            scratch = self._thread_local.scratch = _Scratch(num_pixels, self._normalization)
        return scratch

    def close(self) -> None:
        """Stop the threads."""
        self._pool.shutdown(cancel_futures=True)


def _single_threaded_pool(num_workers: int) -> ThreadPoolExecutor:
    """Return a pool in whose threads torch's operations use one thread each, whatever the caller's setting is.

    Otherwise every thread would start as many as OMP_NUM_THREADS or the number of cores, which wait for each other by
    spinning.
    """
    pool, started = ThreadPoolExecutor(num_workers, thread_name_prefix="photometry"), threading.Barrier(num_workers)

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


class _ViewParameters:
    """The parameters of one view as Python numbers and matrices by image, computed once for a batch."""

    def __init__(self, photometry: Photometry) -> None:
        self.matrix = torch.from_numpy(color_matrix(photometry))
        self.gain = gray_gain(photometry).tolist()
        is_identity = (self.matrix == torch.eye(3)).flatten(1).all(dim=1).tolist()
        self.is_recolored = [not identity or gain != 0 for identity, gain in zip(is_identity, self.gain, strict=True)]
        self.sigma = [
            sigma if flag else None
            for flag, sigma in zip(photometry.blur.tolist(), photometry.blur_sigma.tolist(), strict=True)
        ]
        self.is_solarized = photometry.solarize.tolist()


class _Scratch:
    """Memory of one thread for one image, as float32 planes."""

    def __init__(self, num_pixels: int, normalization: Normalization) -> None:
        self.num_pixels = num_pixels
        self._crop = torch.empty(3, num_pixels)
        self._recolored = torch.empty(3, num_pixels)
        self._luma = torch.tensor(LUMA)
        self._scale, self._shift = scale_and_shift(normalization)

    def load(self, crop: UInt8[Tensor, "S S 3"]) -> None:
        """Convert the crop of an image to planes."""
        height, width, _ = crop.shape
        self._crop.view(3, height, width).copy_(crop.permute(2, 0, 1))

    def render(self, parameters: _ViewParameters, image: int, view: Float32[Tensor, "3 S S"]) -> None:
        """Render the loaded crop with the parameters of an image and write the result to `view`."""
        # Pixels are rounded after every operation, as in the other renderers, which work on uint8.
        pixels = self._crop
        if parameters.is_recolored[image]:
            gray_mean = float(self._luma @ pixels.mean(dim=1)) if parameters.gain[image] else 0.0
            pixels = torch.mm(parameters.matrix[image], pixels, out=self._recolored)
            pixels.add_(parameters.gain[image] * gray_mean).round_().clamp_(0, 255)
        if (sigma := parameters.sigma[image]) is not None:
            pixels = _blur(pixels.view_as(view), sigma).view(3, -1)
        if parameters.is_solarized[image]:
            pixels = torch.where(pixels >= 128, 255 - pixels, pixels)
        torch.mul(pixels.view_as(view), self._scale, out=view).sub_(self._shift)


def _blur(planes: Float32[Tensor, "3 S S"], sigma: float) -> Float32[Tensor, "3 S S"]:
    """Apply a Gaussian blur, one axis after the other."""
    radius = int(blur_radius(np.float32(sigma)))
    offset = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offset / sigma) ** 2)
    kernel /= kernel.sum()
    padded = functional.pad(planes[:, None], (radius,) * 4, mode="reflect")
    blurred = functional.conv2d(functional.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None])
    return blurred[:, 0].round_()
