"""The loader interface, and the function that builds the loader that the settings select."""

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch

from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import IMAGENET, LoaderConfig, Normalization, require
from iwm_fast.pipelines.sampling.batch_plan import BatchPlan
from iwm_fast.pipelines.storage.shard_set import ShardSet


@runtime_checkable
class Loader(Protocol):
    """An iterator over the micro-batches of one rank."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def close(self) -> None:
        """Stop the threads and close the files."""
        ...


def build_loader(
    plan: BatchPlan,
    shards: ShardSet,
    config: LoaderConfig,
    device: torch.device,
    *,
    first: int = 0,
    normalization: Normalization = IMAGENET,
) -> Loader:
    """Build a loader that delivers the plan's micro-batches on a device, starting with micro-batch number `first`.

    The views are normalised with the given mean and standard deviation (data.pixel_mean and data.pixel_std).

    With runtime.loader=dali and a GPU as the device, the GPU renders the images, and with runtime.decode=gpu it also
    decodes them.

    Raises:
        ValueError: if a setting of the GPU decoder is set though no GPU decodes, or if the torch loader is to apply
            RandAugment.
    """
    decodes_on_gpu = config.loader == "dali" and device.type == "cuda" and config.decode == "gpu"
    for name in ("hw_decoder_load", "decoder_preallocate"):
        value = getattr(config, name)
        require(value is None or decodes_on_gpu, f"runtime.{name}", value, "be unset unless DALI decodes on a GPU")
    # The loaders are imported here so that the torch loader works where DALI is not installed.
    if config.loader == "torch":
        require(plan.augment is None, "runtime.loader", "torch", "be dali for RandAugment, or RandAugment be left out")
        from iwm_fast.pipelines.torch_loader import TorchLoader

        return TorchLoader(plan, shards, config, device, first=first, normalization=normalization)
    from iwm_fast.pipelines.dali_loader import DaliLoader

    return DaliLoader(plan, shards, config, device, first=first, normalization=normalization)
