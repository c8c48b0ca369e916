"""The one place that chooses a loader."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch

from pipelines.batch import Batch
from pipelines.config import Backend
from pipelines.plan import Plan
from pipelines.shards import ShardSet


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
    view_size: int
    """Side of both views in pixels."""
    device: torch.device
    """Where batches are delivered; a GPU also decodes and renders them with backend dali."""
    reader_threads: int
    loader_threads: int
    prefetch: int
    """Micro-batches prepared ahead."""


def build_loader(plan: Plan, shards: ShardSet, settings: LoaderSettings, first: int = 0) -> Loader:
    """Build a loader that delivers the plan's micro-batches from number `first` on."""
    if settings.backend == "torch":
        from pipelines.torch_loader import TorchLoader

        return TorchLoader(plan, shards, first=first, view_size=settings.view_size, device=settings.device)
    from pipelines.dali_graph import GraphSettings
    from pipelines.dali_loader import DaliLoader

    graph = GraphSettings(
        view_size=settings.view_size,
        max_batch_size=plan.largest,
        num_threads=settings.loader_threads,
        prefetch=settings.prefetch,
        device_id=settings.device.index or 0 if settings.device.type == "cuda" else None,
    )
    return DaliLoader(
        plan, shards, first=first, settings=graph, reader_threads=settings.reader_threads, device=settings.device
    )
