"""Combines rendered pixels with the request that they were rendered for into a `Batch`."""

from dataclasses import dataclass

import torch
from jaxtyping import Float32
from torch import Tensor

from iwm_fast.pipelines.batch import Batch, to_device
from iwm_fast.pipelines.sampling.batch_plan import Request
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.action import action_vector
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.geometry import Windows, source_geometry


@dataclass(frozen=True, kw_only=True)
class RenderedViews:
    """Both views of a request, normalised, and the windows that they show."""

    source_view: Float32[Tensor, "B 3 H W"]
    target_view: Float32[Tensor, "B 3 H W"]
    windows: Windows


def assemble_batch(
    request: Request, rendered: RenderedViews, shards: ShardSet, views: ViewConfig, device: torch.device
) -> Batch:
    """Return the batch of a request; views, action and patch indices are moved to the device."""
    draws = request.draws
    # The windows follow from the size of the image, and the geometric entries of the action from the windows.
    geometry = source_geometry(draws, *rendered.windows)
    action = action_vector(draws.source, draws.target, views, geometry)
    return Batch(
        source_view=to_device(rendered.source_view, device),
        target_view=to_device(rendered.target_view, device),
        action=to_device(torch.from_numpy(action), device),
        context=request.context.to(device),
        target=request.target.to(device),
        crop_window=torch.from_numpy(rendered.windows.shared),
        source_window=torch.from_numpy(rendered.windows.source),
        # Key and label describe the sample that is shown, which may be a replacement for the scheduled one.
        label=torch.from_numpy(shards.labels(request.samples)),
        sample=torch.from_numpy(request.samples),
        scheduled_sample=torch.from_numpy(request.scheduled_samples),
        slot=torch.from_numpy(request.slots),
        key=tuple(shards.key(int(sample)) for sample in request.samples),
        step=request.step,
        draws=draws,
    )
