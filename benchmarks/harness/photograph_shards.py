"""The shards that pipelines are measured on: written once, then read from the page cache or from the disk.

They contain photographs of installed packages, cropped, resized to the size of an ImageNet image and given camera
noise, so that content, size in pixels and size in bytes resemble those of real shards.
"""

import ctypes
import io
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from iwm_fast.pipelines.counter_rng import uniforms
from iwm_fast.pipelines.demo_data import DEMO_PHOTOGRAPHS, load_photograph
from iwm_fast.pipelines.storage.shard_set import find_shards
from iwm_fast.pipelines.storage.shard_writer import publish_folder, write_shards

NUM_PHOTOGRAPHS = 10
"""The first photographs of the demonstration data, which are in colour."""
JPEG_QUALITY, NOISE = 96, 6.0
"""Quality and standard deviation of the noise in grey levels; with these, 500 x 375 pixels take 110 KB on average."""
MIN_CROP_SCALE = 0.6
"""Minimum width of a crop relative to the widest one that fits."""

Sample = dict[str, str | bytes]


@dataclass(frozen=True, kw_only=True)
class PhotographShards:
    """Contents of a set of shards."""

    num_shards: int = 32
    """More than the workers per GPU, because the webdataset library distributes complete shards over workers."""
    samples_per_shard: int = 128
    width: int = 500
    height: int = 375

    @property
    def num_samples(self) -> int:
        """Number of samples in all shards."""
        return self.num_shards * self.samples_per_shard

    def write(self, folder: Path) -> str:
        """Write the shards into a subfolder unless it exists, and return it as the pattern of the shards."""
        path = folder / f"photographs-{self.width}x{self.height}-{self.num_shards}x{self.samples_per_shard}"
        return write_once(path, self._samples(), self.samples_per_shard)

    def _samples(self) -> Iterator[Sample]:
        photographs = [Image.fromarray(load_photograph(path, None)) for path in DEMO_PHOTOGRAPHS[:NUM_PHOTOGRAPHS]]
        noise = np.random.default_rng(0).normal(0, NOISE, (2 * self.height, 2 * self.width, 3)).astype(np.float32)
        for number, draw in enumerate(uniforms(0, "benchmark", 0, np.arange(self.num_samples), 5)):
            pixels = self._crop(photographs[number % NUM_PHOTOGRAPHS], noise, draw)
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "JPEG", quality=JPEG_QUALITY)
            yield {"__key__": f"{number:08}", "jpg": encoded.getvalue(), "cls": str(number % NUM_PHOTOGRAPHS).encode()}

    def _crop(self, photograph: Image.Image, noise: np.ndarray, draw: np.ndarray) -> np.ndarray:
        """Crop at a random size and position and add noise; draw holds five uniform numbers in [0, 1)."""
        scale, position, noise_offset = draw[0], draw[1:3], draw[3:5]
        max_width = min(photograph.width, photograph.height * self.width / self.height)
        width = max_width * (MIN_CROP_SCALE + (1 - MIN_CROP_SCALE) * scale)
        height = width * self.height / self.width
        left, top = position * (photograph.width - width, photograph.height - height)
        box = (left, top, left + width, top + height)
        pixels = photograph.resize((self.width, self.height), Image.Resampling.BICUBIC, box=box)
        y, x = (noise_offset * (self.height, self.width)).astype(int)
        noisy = np.asarray(pixels) + noise[y : y + self.height, x : x + self.width]
        return noisy.round().clip(0, 255).astype(np.uint8)


def write_numbered_shards(folder: Path, num_shards: int, samples_per_shard: int) -> str:
    """Write shards whose samples contain only their number as text, in order; return the pattern of the shards."""
    numbers = range(num_shards * samples_per_shard)
    samples = ({"__key__": f"{number:08}", "jpg": str(number).encode()} for number in numbers)
    return write_once(folder / f"numbers-{num_shards}x{samples_per_shard}", samples, samples_per_shard)


def write_once(path: Path, samples: Iterable[Sample], samples_per_shard: int) -> str:
    """Write shards into a new folder, published atomically, unless it exists; return the pattern of the shards."""
    if not path.exists():
        print(f"writing {path}", flush=True)
        with publish_folder(path) as staging:
            write_shards(staging / "shard", samples, samples_per_shard)
    return str(path)


def evict_from_page_cache(paths: Iterable[str]) -> float:
    """Evict files from the kernel's page cache; return the share of them that stays cached nevertheless.

    Caches of the disk, or of the host of a virtual machine, are not affected.
    """
    shares = []
    for path in paths:
        with open(path, "rb") as file:
            # The kernel does not evict dirty pages.
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        shares.append(page_cache_share(path))
    return float(np.mean(shares))


def load_into_page_cache(pattern: str) -> None:
    """Read every shard once, so that it is in the kernel's page cache."""
    for path in find_shards(pattern):
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass


def page_cache_share(path: str) -> float:
    """Return the share of a file's pages that are in the kernel's page cache."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), pages
        )
        # The map cannot be closed while its buffer is exported.
        del start
        if failed:
            raise OSError(ctypes.get_errno(), f"mincore cannot tell which pages of {path} are cached")
        return float((np.ctypeslib.as_array(pages) & 1).mean())
