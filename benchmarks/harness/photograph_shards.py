"""The shards that pipelines are measured on: written once, kept, and read from memory or from the disk.

Photographs are the installed ones, cut, enlarged to an ImageNet image's size and given the noise of a camera, so that
content, size in pixels and size in bytes are those of real shards.
"""

import ctypes
import io
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image

from iwm_fast.pipelines.counter_rng import uniforms
from iwm_fast.pipelines.demo_data import DEMO_PHOTOGRAPHS
from iwm_fast.pipelines.storage.shard_set import find_shards
from iwm_fast.pipelines.storage.shard_writer import publish_folder, write_shards

NUM_PHOTOGRAPHS = 10
"""Of those of the demonstration: the ones in colour."""
JPEG_QUALITY, NOISE = 96, 6.0
"""Quality, and standard deviation of the noise in grey levels, at which 500 x 375 pixels take 110 KB on average."""
SMALLEST_CROP = 0.6
"""Width of a crop over the widest that fits."""

LONG_AGO_S = 1_700_000_000

Sample = dict[str, str | bytes]


@dataclass(frozen=True, kw_only=True)
class PhotographShards:
    """A set of shards, by what is in it."""

    num_shards: int = 32
    """More than a machine has workers per GPU: the peer gives each worker shards of its own."""
    samples_per_shard: int = 128
    width: int = 500
    height: int = 375

    @property
    def num_samples(self) -> int:
        """Samples of all shards."""
        return self.num_shards * self.samples_per_shard

    def write(self, folder: Path) -> str:
        """Write the set into a folder of its own in `folder` unless it is there; return the pattern of its shards."""
        place = folder / f"photographs-{self.width}x{self.height}-{self.num_shards}x{self.samples_per_shard}"
        return write_once(place, self._samples(), self.samples_per_shard)

    def _samples(self) -> Iterator[Sample]:
        photographs = [load_photograph(path) for path in DEMO_PHOTOGRAPHS[:NUM_PHOTOGRAPHS]]
        noise = np.random.default_rng(0).normal(0, NOISE, (2 * self.height, 2 * self.width, 3)).astype(np.float32)
        for number, draw in enumerate(uniforms(0, "benchmark", 0, np.arange(self.num_samples), 5)):
            pixels = self._crop(photographs[number % NUM_PHOTOGRAPHS], noise, draw)
            encoded = io.BytesIO()
            Image.fromarray(pixels).save(encoded, "JPEG", quality=JPEG_QUALITY)
            yield {"__key__": f"{number:08}", "jpg": encoded.getvalue(), "cls": str(number % NUM_PHOTOGRAPHS).encode()}

    def _crop(self, photograph: Image.Image, noise: np.ndarray, draw: np.ndarray) -> np.ndarray:
        size, place, grain = draw[0], draw[1:3], draw[3:5]
        widest = min(photograph.width, photograph.height * self.width / self.height)
        width = widest * (SMALLEST_CROP + (1 - SMALLEST_CROP) * size)
        height = width * self.height / self.width
        left, top = place * (photograph.width - width, photograph.height - height)
        box = (left, top, left + width, top + height)
        pixels = photograph.resize((self.width, self.height), Image.Resampling.BICUBIC, box=box)
        y, x = (grain * (self.height, self.width)).astype(int)
        grainy = np.asarray(pixels) + noise[y : y + self.height, x : x + self.width]
        return grainy.round().clip(0, 255).astype(np.uint8)


def load_photograph(path: str) -> Image.Image:
    """Load an installed photograph in its full size; path is package/folders/file."""
    package, inside = path.split("/", 1)
    with resources.files(package).joinpath(inside).open("rb") as file:
        return Image.open(file).convert("RGB")


def write_numbers(folder: Path, num_shards: int, samples_per_shard: int) -> str:
    """Write shards of samples that hold their own number as text, sorted; return their pattern."""
    numbers = range(num_shards * samples_per_shard)
    samples = ({"__key__": f"{number:08}", "jpg": str(number).encode()} for number in numbers)
    return write_once(folder / f"numbers-{num_shards}x{samples_per_shard}", samples, samples_per_shard)


def write_linked(folder: Path, num_shards: int, samples_per_shard: int) -> str:
    """Write one shard of samples of a byte and give it many names, so that many shards take the room of one."""
    samples = ({"__key__": f"n{number:08}", "jpg": b"x", "cls": b"0"} for number in range(samples_per_shard))
    shard = Path(find_shards(write_once(folder / f"bytes-{samples_per_shard}", samples, samples_per_shard))[0])
    # an index of a shard that has just been written is not kept
    os.utime(shard, (LONG_AGO_S, LONG_AGO_S))
    place = folder / f"linked-{num_shards}x{samples_per_shard}"
    place.mkdir(exist_ok=True)
    for number in range(num_shards):
        name = place / f"{number:06}.tar"
        if not name.exists():
            name.hardlink_to(shard)
    return str(place)


def write_once(place: Path, samples: Iterable[Sample], samples_per_shard: int) -> str:
    """Write shards into a folder that is whole or not there, and keep them; return their pattern."""
    if not place.exists():
        print(f"writing {place}", flush=True)
        with publish_folder(place) as staging:
            write_shards(staging / "shard", samples, samples_per_shard)
    return str(place)


def drop_from_memory(paths: Iterable[str]) -> float:
    """Ask the kernel to forget these files' content; return the share of it that stays in memory all the same.

    What the disk or a host of this machine keeps of them is out of reach.
    """
    shares = []
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            # only what is on the disk can be forgotten
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
        shares.append(share_in_memory(path))
    return float(np.mean(shares))


def read_into_memory(pattern: str) -> None:
    """Read every shard once, so that the kernel holds its content."""
    for path in find_shards(pattern):
        with open(path, "rb") as file:
            while file.read(1 << 24):
                pass


def share_in_memory(path: str) -> float:
    """Return the share of a file's pages that the kernel holds in memory."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        pages = (ctypes.c_ubyte * -(-len(mapped) // mmap.PAGESIZE))()
        start = ctypes.c_char.from_buffer(mapped)
        failed = ctypes.CDLL(None, use_errno=True).mincore(
            ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), pages
        )
        # while it is exported the map cannot be closed
        del start
        if failed:
            raise OSError(ctypes.get_errno(), f"the kernel does not say what of {path} it holds")
        return float((np.ctypeslib.as_array(pages) & 1).mean())
