"""The reference loader: Pillow decodes, torch operations render, and each batch is made when it is requested."""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float32, UInt8
from torch import Tensor

from iwm_fast.pipelines.assemble import RenderedViews, assemble_batch
from iwm_fast.pipelines.bad_samples import BadSampleReplacer, error_as_value
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import LoaderConfig, Normalization
from iwm_fast.pipelines.sampling.batch_plan import BatchPlan, EndOfPlanError, Request
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.geometry import view_windows
from iwm_fast.pipelines.transforms.image_decoding import decode_image
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.pipelines.transforms.torch_renderer import render, resized_crop


class TorchLoader:
    """Renders the micro-batches of a plan in order, in the calling thread; see `Loader`."""

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
        self._views = plan.views
        self._device = device
        self._normalization = normalization
        self._next_index = first
        self._reader = Reader(shards, num_threads=1)
        self._decode = error_as_value(partial(decode_image, max_pixels=shards.max_pixels))
        self._replacer = BadSampleReplacer(plan, shards, self._reader, config.max_bad_samples, self._decode)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            request = self._plan.request(self._next_index)
        except EndOfPlanError:
            raise StopIteration from None
        self._next_index += 1
        request, images = self._replacer.replace(request, self._reader.read(request.samples, self._decode))
        return assemble_batch(request, self._render(request, images), self._shards, self._views, self._device)

    def _render(self, request: Request, images: list[UInt8[Tensor, "_ _ 3"]]) -> RenderedViews:
        draws = request.draws
        windows = view_windows(draws, np.array([image.shape[:2] for image in images]))
        target = self._crop(images, windows.shared, draws.flip)
        # Without views.crop.source_scale and source flips, both views start from the same pixels.
        source = target
        if self._views.has_source_geometry:
            source = self._crop(images, windows.source, draws.flip ^ draws.source_flip)
        return RenderedViews(
            source_view=normalize_view(render(source, draws.source, self._views), self._normalization),
            target_view=normalize_view(render(target, draws.target, self._views), self._normalization),
            windows=windows,
        )

    def _crop(
        self,
        images: list[UInt8[Tensor, "_ _ 3"]],
        window: Float32[np.ndarray, "B 4"],
        flip: Bool[np.ndarray, "B"],
    ) -> UInt8[Tensor, "B S S 3"]:
        """Cut the windows out, resize them to the views' size, and mirror the flagged ones; on the loader's device."""
        crops = [resized_crop(*pair, self._views.size) for pair in zip(images, window, strict=True)]
        crop = torch.stack(crops).to(self._device)
        is_flipped = torch.from_numpy(flip).to(self._device)[:, None, None, None]
        return torch.where(is_flipped, crop.flip(2), crop)

    def close(self) -> None:
        """Stop the reader's thread and close the files."""
        self._reader.close()
