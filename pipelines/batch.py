"""The objects that cross from data to training."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from iwm_fast.pipelines.transforms.parameters import Draws


@dataclass(frozen=True, kw_only=True)
class RaggedIndex:
    """Some patches of each image of a batch, packed one image after the other; M is their number."""

    patch: Int64[Tensor, "M"]
    """Number of the patch in its image's grid, in raster order."""
    row: Int64[Tensor, "M"]
    """Row in the flattened (B * N) tokens: image * N + patch."""
    offsets: Int32[Tensor, "images"]
    """Where each image's patches begin, B + 1 entries: 0 first, M last."""
    longest: int
    """Most patches of one image in this batch."""
    total: int
    """Patches over the whole global batch of the step: what a summed loss is divided by."""

    def to(self, device: torch.device) -> "RaggedIndex":
        """Copy to a device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("patch", "row", "offsets")}
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank: B images in two views and what changed between them."""

    source_view: Float[Tensor, "B 3 H W"]
    """Normalised image the context comes from."""
    target_view: Float[Tensor, "B 3 H W"]
    """Normalised image whose tokens are predicted."""
    action: Float[Tensor, "B A"]
    """Change source -> target, of order one per entry; zero means no change."""
    context: RaggedIndex
    """Visible patches of the source view."""
    target: RaggedIndex
    """Patches to predict."""
    crop_window: Float[Tensor, "B 4"]
    """Top, left, height, width of the shared crop in the stored image's pixels."""
    source_window: Float[Tensor, "B 4"]
    """The same of the source view; another place only with views.source_crop."""
    label: Int64[Tensor, "B"]
    """Class number, -1 where the sample has none."""
    sample: Int64[Tensor, "B"]
    """Number of the sample in the data set."""
    scheduled_sample: Int64[Tensor, "B"]
    """Number of the sample that the shuffled order put here; differs from `sample` if it could not be decoded."""
    slot: Int64[Tensor, "B"]
    """Place in the global batch."""
    key: tuple[str, ...]
    """Name of each sample as its shard gives it."""
    step: int
    """Optimiser step this batch belongs to."""
    draws: Draws
    """All that was drawn for it, on the host."""

    def tensors_on_device(self) -> list[Tensor]:
        """Return what the device holds of it."""
        indexes = [
            getattr(index, name) for index in (self.context, self.target) for name in ("patch", "row", "offsets")
        ]
        return [self.source_view, self.target_view, self.action, *indexes]
