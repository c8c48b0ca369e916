"""The one place that chooses a loader."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import Backend, check
from iwm_fast.pipelines.sampling.batch_plan import Plan
from iwm_fast.pipelines.storage.shard_set import ShardSet


@runtime_checkable
class Loader(Protocol):
    """An iterator over one rank's micro-batches."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def close(self) -> None:
        """Release threads and files."""
        ...


@dataclass(frozen=True, kw_only=True)
class LoaderSettings:
    """How batches are made; none of it changes what is in them."""

    backend: Backend
    device: torch.device
    """Where batches are delivered; a GPU also decodes and renders them with backend dali."""
    reader_threads: int
    loader_threads: int
    prefetch: int
    """Micro-batches prepared ahead."""
    read_ahead: int = 2
    """Micro-batches whose bytes are asked for before those are prepared."""
    max_bad_samples: float = 0.0
    """Different undecodable samples that are replaced before it is an error: a count, or below 1 a share of all."""
    hw_decoder_load: float | None = None
    preallocate: tuple[int, int] | None = None
    """See `iwm_fast.pipelines.transforms.dali_graph.GraphSettings` for both; only for backend dali on a GPU."""


def build_loader(plan: Plan, shards: ShardSet, settings: LoaderSettings, first: int = 0) -> Loader:
    """Build a loader that delivers the plan's micro-batches from number `first` on.

    Raises:
        ValueError: if a setting of a GPU's decoder is given and no GPU decodes, or the torch loader has to augment.
    """
    is_on_gpu = settings.backend == "dali" and settings.device.type == "cuda"
    for name, value in (("hw_decoder_load", settings.hw_decoder_load), ("decoder_preallocate", settings.preallocate)):
        check(value is None or is_on_gpu, f"runtime.{name}", value, "be unset unless DALI decodes on a GPU")
    if settings.backend == "torch":
        check(plan.augment is None, "runtime.loader", "torch", "be dali for RandAugment, or that be left out")
        from iwm_fast.pipelines.torch_loader import TorchLoader

        return TorchLoader(plan, shards, first=first, max_bad_samples=settings.max_bad_samples, device=settings.device)
    from iwm_fast.pipelines.dali_loader import DaliLoader, DaliSettings
    from iwm_fast.pipelines.transforms.dali_graph import GraphSettings

    graph = GraphSettings(
        views=plan.views,
        max_batch_size=plan.largest,
        num_threads=settings.loader_threads,
        prefetch=settings.prefetch,
        device_id=settings.device.index or 0 if is_on_gpu else None,
        hw_decoder_load=settings.hw_decoder_load,
        preallocate=settings.preallocate,
        # RandAugment is DALI's; views are made in the graph on a GPU, behind it on a CPU
        output="normalized" if is_on_gpu or plan.augment is not None else "crops",
    )
    chosen = DaliSettings(
        graph=graph,
        reader_threads=settings.reader_threads,
        read_ahead=settings.read_ahead,
        max_bad_samples=settings.max_bad_samples,
    )
    return DaliLoader(plan, shards, first=first, settings=chosen, device=settings.device)
