"""The data structures that a loader hands to training: `Batch`, and `RaggedIndex` for its patches."""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from iwm_fast.pipelines.transforms.composition import Draws


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor on a device. The host does not wait for the copy to a GPU."""
    # A GPU reads pageable memory only through a buffer, for which the host waits in spite of `non_blocking`.
    if device.type == "cuda" and not tensor.is_cuda:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


@dataclass(frozen=True, kw_only=True)
class RaggedIndex:
    """Patches selected from each image of a batch, packed image after image without padding; M is their number."""

    patch: Int64[Tensor, "M"]
    """Number of the patch in its image's grid, in raster order."""
    row: Int64[Tensor, "M"]
    """Row in the flattened (B * N) tokens: image * N + patch."""
    offsets: Int32[Tensor, "images"]
    """Start of each image's patches: B + 1 entries, the first is 0 and the last is M."""
    lengths: tuple[int, ...]
    """Number of patches of each image, on the host."""
    # A loss over ragged targets is a sum. Dividing it by the count of the global batch, not of this micro-batch, makes
    # it independent of the number of ranks and of gradient accumulation.
    total: int
    """Number of patches in the global batch of the step: the divisor of a summed loss."""

    def to(self, device: torch.device) -> "RaggedIndex":
        """Return a copy on a device."""
        moved = {name: to_device(getattr(self, name), device) for name in ("patch", "row", "offsets")}
        return replace(self, **moved)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch of one rank: B images in two views, and the change between the views."""

    source_view: Float[Tensor, "B 3 H W"]
    """Normalised image from which the context is taken."""
    target_view: Float[Tensor, "B 3 H W"]
    """Normalised image whose tokens are predicted."""
    action: Float[Tensor, "B A"]
    """Change from source to target view, of order one per entry; zero means no change."""
    context: RaggedIndex
    """Visible patches of the source view."""
    target: RaggedIndex
    """Patches to predict."""
    crop_window: Float[Tensor, "B 4"]
    """Top, left, height and width of the crop that both views share, in pixels of the stored image."""
    source_window: Float[Tensor, "B 4"]
    """Top, left, height and width of the source view; equal to `crop_window` unless views.source_crop is set."""
    label: Int64[Tensor, "B"]
    """Class number, -1 where the sample has none."""
    sample: Int64[Tensor, "B"]
    """Number of the sample in the data set."""
    scheduled_sample: Int64[Tensor, "B"]
    """Number of the sample that the shuffled order assigns to the slot; differs from `sample` if it is undecodable."""
    slot: Int64[Tensor, "B"]
    """Position in the global batch, 0 to global_batch_size - 1."""
    key: tuple[str, ...]
    """Name of each sample in its shard."""
    step: int
    """Optimiser step that this batch belongs to."""
    draws: Draws
    """All random parameters of the batch, as NumPy arrays on the host."""

    def tensors_on_device(self) -> list[Tensor]:
        """Return the tensors that live on the training device; all others stay on the host."""
        index_tensors = [
            getattr(index, name) for index in (self.context, self.target) for name in ("patch", "row", "offsets")
        ]
        return [self.source_view, self.target_view, self.action, *index_tensors]
