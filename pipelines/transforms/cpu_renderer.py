"""Photometry on a CPU: planes of float32, one image after the other, in memory that stays in the cache.

The fast twin of `torch_renderer.render` and `normalization.normalize_view`. A GPU does the same inside DALI's graph;
DALI's operators for a CPU take twice as long for it, one value at a time (benchmarks/README.md).
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

from iwm_fast.pipelines.transforms.normalization import normalization
from iwm_fast.pipelines.transforms.parameters import LUMA, Draws, Photometry, blur_radius, color_matrix, gray_gain


class CpuPhotometry:
    """Makes two normalised views of crops, in `num_threads` threads."""

    def __init__(self, num_threads: int) -> None:
        self._threads = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="photometry")
        self._num_threads = num_threads
        self._memory = RecycledMemory()
        self._of_thread = threading.local()

    def views(
        self, source_crop: UInt8[Tensor, "B S S 3"], target_crop: UInt8[Tensor, "B S S 3"], draws: Draws
    ) -> tuple[Float32[Tensor, "B 3 S S"], Float32[Tensor, "B 3 S S"]]:
        """Return source and target view as `Batch` has them; both may be made of the same crop."""
        batch, height, width, _ = target_crop.shape
        jobs = [
            (_Photometries(draws.source), source_crop, self._memory.take((batch, 3, height, width))),
            (_Photometries(draws.target), target_crop, self._memory.take((batch, 3, height, width))),
        ]

        def render(first: int) -> None:
            scratch = self._scratch(height * width)
            for image in range(first, batch, self._num_threads):
                shown = None
                for photometries, crop, views in jobs:
                    if crop is not shown:
                        scratch.load(crop[image])
                        shown = crop
                    scratch.render(photometries, image, views[image])

        for _ in self._threads.map(render, range(self._num_threads)):
            pass
        (_, _, source_view), (_, _, target_view) = jobs
        return source_view, target_view

    def _scratch(self, num_pixels: int) -> "_Scratch":
        scratch = getattr(self._of_thread, "scratch", None)
        if scratch is None or scratch.num_pixels != num_pixels:
            scratch = self._of_thread.scratch = _Scratch(num_pixels)
        return scratch

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)


class RecycledMemory:
    """Tensors whose memory is used again once nothing refers to it.

    A batch is too large for malloc to keep: each would begin with pages that the kernel fills with zeros, which takes
    as long as the photometry itself.
    """

    def __init__(self) -> None:
        self._free: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)

    def take(self, shape: tuple[int, ...]) -> Float32[Tensor, "..."]:
        """Return a tensor of a shape; what is in it is undefined."""
        free = self._free[shape]
        block = free.pop() if free else np.empty(shape, np.float32)
        # torch keeps this very object until the last tensor that shares its memory is gone
        lease = block[...]
        weakref.finalize(lease, free.append, block).atexit = False
        return torch.from_numpy(lease)


class _Photometries:
    """One view's parameters, ready for each image."""

    def __init__(self, photometry: Photometry) -> None:
        self.matrix = torch.from_numpy(color_matrix(photometry))
        self.gain = gray_gain(photometry).tolist()
        is_identity = (self.matrix == torch.eye(3)).flatten(1).all(dim=1).tolist()
        self.is_recolored = [not same or gain != 0 for same, gain in zip(is_identity, self.gain, strict=True)]
        self.sigma = [
            sigma if flag else None
            for flag, sigma in zip(photometry.blur.tolist(), photometry.blur_sigma.tolist(), strict=True)
        ]
        self.is_solarized = photometry.solarize.tolist()


class _Scratch:
    """One thread's memory for one image, as planes."""

    def __init__(self, num_pixels: int) -> None:
        self.num_pixels = num_pixels
        self._crop, self._changed = torch.empty(3, num_pixels), torch.empty(3, num_pixels)
        self._luma = torch.tensor(LUMA)
        self._scale, self._shift = normalization()

    def load(self, crop: UInt8[Tensor, "S S 3"]) -> None:
        """Take up the image that is shown."""
        height, width, _ = crop.shape
        self._crop.view(3, height, width).copy_(crop.permute(2, 0, 1))

    def render(self, photometries: _Photometries, image: int, view: Float32[Tensor, "3 S S"]) -> None:
        """Write a view of it."""
        pixels = self._crop
        if photometries.is_recolored[image]:
            gray_mean = float(self._luma @ pixels.mean(dim=1)) if photometries.gain[image] else 0.0
            pixels = torch.mm(photometries.matrix[image], pixels, out=self._changed)
            pixels.add_(photometries.gain[image] * gray_mean).round_().clamp_(0, 255)
        if (sigma := photometries.sigma[image]) is not None:
            pixels = _blur(pixels.view_as(view), sigma).view(3, -1)
        if photometries.is_solarized[image]:
            pixels = torch.where(pixels >= 128, 255 - pixels, pixels)
        torch.mul(pixels.view_as(view), self._scale, out=view).sub_(self._shift)


def _blur(planes: Float32[Tensor, "3 S S"], sigma: float) -> Float32[Tensor, "3 S S"]:
    radius = int(blur_radius(np.float32(sigma)))
    place = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (place / sigma) ** 2)
    kernel /= kernel.sum()
    padded = functional.pad(planes[:, None], (radius,) * 4, mode="reflect")
    blurred = functional.conv2d(functional.conv2d(padded, kernel[None, None, :, None]), kernel[None, None, None])
    return blurred[:, 0].round_()
