"""Puts pixels, plan and action together into a batch."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import ViewConfig
from iwm_fast.pipelines.sampling.batch_plan import Request
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.action import action_vector
from iwm_fast.pipelines.transforms.geometry import source_geometry


@dataclass(frozen=True, kw_only=True)
class RenderedViews:
    """What a backend makes of a request."""

    source_view: Float32[Tensor, "B 3 H W"]
    """Normalised, as in `Batch`."""
    target_view: Float32[Tensor, "B 3 H W"]
    crop_window: Float32[np.ndarray, "B 4"]
    source_window: Float32[np.ndarray, "B 4"]


def assemble(
    request: Request, rendered: RenderedViews, shards: ShardSet, views: ViewConfig, device: torch.device
) -> Batch:
    """Put pixels and request together, on the device."""
    draws = request.draws
    geometry = source_geometry(draws, rendered.crop_window, rendered.source_window)
    action = action_vector(draws.source, draws.target, views, geometry)
    return Batch(
        source_view=rendered.source_view.to(device, non_blocking=True),
        target_view=rendered.target_view.to(device, non_blocking=True),
        action=torch.from_numpy(action).to(device, non_blocking=True),
        context=request.context.to(device),
        target=request.target.to(device),
        crop_window=torch.tensor(rendered.crop_window),
        source_window=torch.tensor(rendered.source_window),
        label=torch.from_numpy(shards.labels(request.samples)),
        sample=torch.from_numpy(request.samples),
        scheduled_sample=torch.from_numpy(request.scheduled_samples),
        slot=torch.from_numpy(request.slots),
        key=tuple(shards.key(int(sample)) for sample in request.samples),
        step=request.step,
        draws=draws,
    )
