"""The plain twin: Pillow decodes, `pipelines.views` renders, nothing runs ahead."""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from pipelines.actions import crop_window
from pipelines.batch import Batch
from pipelines.plan import EndOfPlanError, Plan, Request, assemble, undecodable
from pipelines.reader import Reader
from pipelines.shards import ShardSet
from pipelines.views import UNDECODABLE, decode_image, render, resized_crop


class TorchLoader:
    """Carries out a plan's requests one after the other."""

    def __init__(self, plan: Plan, shards: ShardSet, *, first: int, view_size: int, device: torch.device) -> None:
        self._plan, self._shards, self._next = plan, shards, first
        self._view_size, self._device = view_size, device
        self._reader = Reader(shards, num_threads=1)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        try:
            request = self._plan.request(self._next)
        except EndOfPlanError:
            raise StopIteration from None
        self._next += 1
        images = self._decode(request)
        window = crop_window(request.draws.crop, np.array([image.shape[:2] for image in images]))
        crops = [resized_crop(*pair, self._view_size) for pair in zip(images, window, strict=True)]
        crop = torch.stack(crops).to(self._device)
        flip = torch.from_numpy(request.draws.flip).to(self._device)
        crop = torch.where(flip[:, None, None, None], crop.flip(2), crop)
        source_view, target_view = render(crop, request.draws.source), render(crop, request.draws.target)
        return assemble(
            request,
            self._shards,
            source_view=source_view,
            target_view=target_view,
            crop_window=window,
            device=self._device,
        )

    def _decode(self, request: Request) -> list[UInt8[Tensor, "H W 3"]]:
        images = []
        for sample, encoded in zip(request.samples, self._reader.read(request.samples), strict=True):
            try:
                images.append(decode_image(encoded))
            except UNDECODABLE as error:
                raise undecodable(self._shards, int(sample), request.step) from error
        return images

    def close(self) -> None:
        """Release files and threads."""
        self._reader.close()
