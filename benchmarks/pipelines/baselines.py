"""Who ours is compared with: DALI's own reader, the webdataset library's, and that with torchvision in a DataLoader.

The last is written as one who knows both would: as many workers as cores, batches put together in the workers, shards
and samples shuffled; with torchvision on tensors and on Pillow images, whichever is faster.
"""

import io
import multiprocessing
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms import v2
from webdataset.compat import WebDataset

from benchmarks.harness.interleave import Stream
from benchmarks.pipelines.dali_baselines import read_graph, runs
from benchmarks.pipelines.streams import Workload, touch
from iwm_fast.pipelines.config import ViewConfig
from iwm_fast.pipelines.storage.shard_set import ShardSet, find_shards
from iwm_fast.pipelines.transforms.normalization import PIXEL_MEAN, PIXEL_STD

STYLES = ("tensors", "Pillow", "tensors, normalised last")
BLUR_WINDOW = 23
BUFFER = 1000
"""Samples that the webdataset library mixes; `pipeline_graphs.BUFFER` is DALI's."""
_PREFETCH = 2


def dali_reader_stream(workload: Workload) -> Stream:
    """Return DALI's reader alone."""

    def start() -> Iterator[Any]:
        with TemporaryDirectory() as folder:
            paths, index_paths = write_indexes(workload.shards, Path(folder))
            # without an index it would read every shard while it opens
            yield from arrays(read_graph(paths, index_paths, batch_size=workload.batch_size, num_threads=1))

    return Stream(start, touch, ahead=4)


def write_indexes(shards: ShardSet, folder: Path) -> tuple[list[str], list[str]]:
    """Write the indexes that DALI's wds2idx would; return the shards' paths and theirs."""
    for number, shard in enumerate(shards.shards):
        places = zip(shard.image_offset.tolist(), shard.image_size.tolist(), shard.keys, strict=True)
        lines = [f"jpg {offset} {size} {key}.jpg" for offset, size, key in places]
        (folder / f"{number:06}.idx").write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n")
    return [shard.path for shard in shards.shards], sorted(str(path) for path in folder.iterdir())


def arrays(graph: Any) -> Iterator[list[np.ndarray]]:
    """Return the batches of DALI's reader, for ever."""
    for (encoded,) in runs(graph):
        yield [np.asarray(encoded.at(image)) for image in range(len(encoded))]


def library_reader_stream(workload: Workload) -> Stream:
    """Return the webdataset library alone, in this process."""

    def start() -> Iterator[Any]:
        data = shuffled(find_shards(workload.pattern)).repeat().batched(workload.batch_size, collation_fn=_bytes)
        return (batch for batch in data)

    return Stream(start, touch)


def shuffled(paths: list[str]) -> Any:
    """Return the library's data set with shards and samples shuffled, as its documentation has it."""
    return WebDataset(paths, shardshuffle=len(paths), empty_check=False).shuffle(BUFFER).to_tuple("jpg")


def _bytes(samples: list[tuple[bytes]]) -> list[np.ndarray]:
    return [np.frombuffer(encoded, np.uint8) for (encoded,) in samples]


def peer_stream(workload: Workload, style: str) -> Stream:
    """Return two views from the webdataset library and torchvision; style is one of STYLES."""
    is_on_gpu, workers = workload.device.type == "cuda", workload.threads

    def start() -> Iterator[list[Tensor]]:
        # a fork of a process with DALI's threads may hang; this one has imported the module already
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        transform, normalize = TwoViews(workload.views, style), _normalize()
        loader = DataLoader(
            shuffled(find_shards(workload.pattern)).map(transform).repeat(),
            batch_size=workload.batch_size,
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            pin_memory=is_on_gpu,
            multiprocessing_context=context,
        )
        # closing the generator lets go of the loader's iterator, which stops the workers
        for views in loader:
            moved = [view.to(workload.device, non_blocking=True) for view in views]
            yield [normalize(view) if view.dtype == torch.uint8 else view for view in moved]

    def take(views: list[Tensor]) -> int:
        if is_on_gpu:
            torch.cuda.current_stream(workload.device).synchronize()
        return len(views[0])

    return Stream(start, take, ahead=_PREFETCH * workers, burst=workers)


class TwoViews:
    """Makes source and target view of one encoded sample with torchvision."""

    def __init__(self, views: ViewConfig, style: str) -> None:
        """Take what is drawn, and one of STYLES."""
        strengths = (views.brightness, views.contrast, views.saturation, views.hue)
        finish = [] if style == STYLES[2] else [_normalize()]
        # each call draws anew, so both views can share it
        jitter = v2.RandomApply([v2.ColorJitter(*strengths)], views.jitter_probability)
        destroy = [
            v2.RandomGrayscale(views.grayscale_probability),
            v2.RandomApply([v2.GaussianBlur(BLUR_WINDOW, views.blur_sigma)], views.blur_probability),
            v2.RandomSolarize(128, views.solarize_probability),
        ]
        self._decode = decode_pillow if style == STYLES[1] else decode_tensor
        self._crop = v2.Compose(
            [
                v2.RandomResizedCrop(views.size, views.crop_scale, views.crop_aspect, antialias=True),
                v2.RandomHorizontalFlip(views.flip_probability),
            ]
        )
        self._source, self._target = v2.Compose([jitter, *destroy, *finish]), v2.Compose([jitter, *finish])

    def __call__(self, sample: tuple[bytes]) -> tuple[Tensor, Tensor]:
        """Decode, crop once, and change each view on its own."""
        (encoded,) = sample
        crop = self._crop(self._decode(encoded))
        return self._source(crop), self._target(crop)


def decode_tensor(encoded: bytes) -> Tensor:
    """Decode with torchvision."""
    content = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    return decode_jpeg(content, mode=ImageReadMode.RGB)  # pyright: ignore[reportReturnType]


def decode_pillow(encoded: bytes) -> Image.Image:
    """Decode with Pillow."""
    with Image.open(io.BytesIO(encoded)) as image:
        return image.convert("RGB")


def _normalize() -> v2.Transform:
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(PIXEL_MEAN, PIXEL_STD)])
