"""Baselines: DALI's webdataset reader, alone and with DALI's operators, and the webdataset library, alone and with
torchvision in a DataLoader.

The last one follows good practice: one worker per core, batches collated in the workers, shards and samples shuffled.
It runs with torchvision on tensors and on Pillow images; the faster one counts.
"""

import io
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
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
from benchmarks.pipelines.dali_baselines import read_graph, run_forever, views_graph
from benchmarks.pipelines.streams import Workload, touch_pages
from iwm_fast.pipelines.config import IMAGENET
from iwm_fast.pipelines.storage.shard_set import ShardSet, find_shards
from iwm_fast.pipelines.transforms.composition import ViewConfig

STYLES = ("tensors", "Pillow", "tensors, normalised last")
BLUR_WINDOW = 23
BUFFER = 1000
"""Size of the webdataset library's shuffle buffer in samples."""
_PREFETCH = 2


def dali_reader_stream(workload: Workload) -> Stream:
    """Return DALI's reader alone."""

    def start() -> Iterator[Any]:
        with indexed_files(workload.shards) as files:
            yield from numpy_batches(read_graph(*files, workload.batch_size))

    return Stream(start, touch_pages, prefetched=4)


def dali_views_stream(workload: Workload) -> Stream:
    """Return pairs of views from DALI alone: its reader, its random operators and its photometry."""

    def start() -> Iterator[list[Tensor]]:
        with indexed_files(workload.shards) as files:
            for outputs in run_forever(views_graph(*files, workload.views, workload.graph_settings)):
                yield [torch.from_dlpack(output.as_tensor()) for output in outputs]

    def consume(views: list[Tensor]) -> int:
        if workload.device.type == "cuda":
            # DALI computes in a stream of its own.
            torch.cuda.synchronize(workload.device)
        return len(views[0])

    return Stream(start, consume, prefetched=4)


@contextmanager
def indexed_files(shards: ShardSet) -> Iterator[tuple[list[str], list[str]]]:
    """Yield the paths of shards, and of index files as wds2idx writes them, which save DALI reading all shards."""
    with TemporaryDirectory() as folder:
        for number, shard in enumerate(shards.shards):
            images = zip(shard.image_offset.tolist(), shard.image_size.tolist(), shard.keys, strict=True)
            lines = [f"jpg {offset} {size} {key}.jpg" for offset, size, key in images]
            Path(folder, f"{number:06}.idx").write_text("\n".join([f"v1.2 {len(lines)}", *lines]) + "\n")
        yield [shard.path for shard in shards.shards], sorted(str(path) for path in Path(folder).iterdir())


def numpy_batches(graph: Any) -> Iterator[list[np.ndarray]]:
    """Yield the batches of DALI's reader as lists of encoded images, indefinitely."""
    for (encoded,) in run_forever(graph):
        yield [np.asarray(encoded.at(image)) for image in range(len(encoded))]


def webdataset_reader_stream(workload: Workload) -> Stream:
    """Return the webdataset library alone, in this process."""

    def start() -> Iterator[Any]:
        dataset = shuffled_dataset(find_shards(workload.pattern)).repeat()
        return (batch for batch in dataset.batched(workload.batch_size, collation_fn=_as_arrays))

    return Stream(start, touch_pages)


def shuffled_dataset(paths: list[str]) -> Any:
    """Return the library's dataset with shuffled shards and samples, as its documentation recommends."""
    return WebDataset(paths, shardshuffle=len(paths), empty_check=False).shuffle(BUFFER).to_tuple("jpg")


def _as_arrays(samples: list[tuple[bytes]]) -> list[np.ndarray]:
    return [np.frombuffer(encoded, np.uint8) for (encoded,) in samples]


def torchvision_stream(workload: Workload, style: str) -> Stream:
    """Return pairs of views from the webdataset library and torchvision; style is one of STYLES."""
    workers = workload.threads

    def start() -> Iterator[list[Tensor]]:
        # Forking a process with DALI's threads may deadlock. The fork server is clean, and preloads the imports.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        transform, normalize = TwoViews(workload.views, style), _normalize()
        loader = DataLoader(
            shuffled_dataset(find_shards(workload.pattern)).map(transform).repeat(),
            batch_size=workload.batch_size,
            num_workers=workers,
            prefetch_factor=_PREFETCH,
            pin_memory=workload.device.type == "cuda",
            multiprocessing_context=context,
        )
        # Closing this generator drops the last reference to the loader's iterator, which stops the workers.
        for views in loader:
            on_device = [view.to(workload.device, non_blocking=True) for view in views]
            yield [normalize(view) if view.dtype == torch.uint8 else view for view in on_device]

    return Stream(start, lambda views: workload.complete(views[0]), prefetched=_PREFETCH * workers, burst=workers)


class TwoViews:
    """Renders source and target view of an encoded sample with torchvision; style is one of STYLES."""

    def __init__(self, views: ViewConfig, style: str) -> None:
        strengths = tuple(entry.strength for entry in views.jitter.entries)
        normalize = [] if style == STYLES[2] else [_normalize()]
        # Each call draws new parameters, so both views can share the module.
        jitter = v2.RandomApply([v2.ColorJitter(*strengths)], views.jitter.probability)
        degrade = [
            v2.RandomGrayscale(views.grayscale.probability),
            v2.RandomApply([v2.GaussianBlur(BLUR_WINDOW, views.blur.sigma)], views.blur.probability),
            v2.RandomSolarize(128, views.solarize.probability),
        ]
        self._decode = decode_pillow if style == STYLES[1] else decode_tensor
        crop = v2.RandomResizedCrop(views.size, views.crop.scale, views.crop.aspect, antialias=True)
        self._crop = v2.Compose([crop, v2.RandomHorizontalFlip(views.flip.probability)])
        self._source = v2.Compose([jitter, *degrade, *normalize])
        self._target = v2.Compose([jitter, *normalize])

    def __call__(self, sample: tuple[bytes]) -> tuple[Tensor, Tensor]:
        """Decode and crop once, then transform each view independently."""
        (encoded,) = sample
        crop = self._crop(self._decode(encoded))
        return self._source(crop), self._target(crop)


def decode_tensor(encoded: bytes) -> Tensor:
    """Decode a JPEG with torchvision."""
    content = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    return decode_jpeg(content, mode=ImageReadMode.RGB)  # pyright: ignore[reportReturnType]


def decode_pillow(encoded: bytes) -> Image.Image:
    """Decode an image with Pillow."""
    with Image.open(io.BytesIO(encoded)) as image:
        return image.convert("RGB")


def _normalize() -> v2.Transform:
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(*IMAGENET)])
