"""What the model will see, before any training: a picture of a few samples of the stream."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from iwm_fast.config.run import RunConfig
from iwm_fast.pipelines.batch import Batch, RaggedIndex
from iwm_fast.pipelines.transforms.action import describe_action
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.rendering.image_grid import Panel, save_sheet, shade
from iwm_fast.runtime.distributed import RankInfo, choose_device
from iwm_fast.training.loaders import open_training_shards, training_loader

_MOST_IMAGES = 8


def show(config: RunConfig) -> Path:
    """Write `show.png` into the run folder: source, what of it is visible, target, what of it is predicted, action."""
    device = choose_device(config.runtime.device)
    shards = open_training_shards(config.data)
    loader = training_loader(config, shards, RankInfo(rank=0, local_rank=0, world_size=1, device=device))
    try:
        batch = next(loader)
    finally:
        loader.close()
    path = Path(config.output.folder) / "show.png"
    labels = ("source view", "its visible patches", "target view", "patches to predict")
    title = f"{config.data.train}: first samples of the stream, seed {config.seed}"
    columns = _columns(batch, config)
    save_sheet(path, labels, list(zip(*columns, strict=True)), title)
    return path


def _columns(batch: Batch, config: RunConfig) -> Sequence[Sequence[Panel]]:
    sources, targets = (
        denormalize_view(batch.source_view).cpu().numpy(),
        denormalize_view(batch.target_view).cpu().numpy(),
    )
    columns = []
    for image in range(min(_MOST_IMAGES, len(batch.key))):
        context = _grid(batch.context, image, config.grid)
        target = _grid(batch.target, image, config.grid)
        words = describe_action(batch.action[image].cpu().numpy(), config.views)
        columns.append(
            [
                Panel(pixels=sources[image], caption=batch.key[image]),
                Panel(pixels=shade(sources[image], ~context), caption=f"{context.sum()} of {context.size} patches"),
                Panel(pixels=targets[image], caption=f"action: {words}"),
                Panel(pixels=shade(targets[image], ~target), caption=f"{target.sum()} of {target.size} patches"),
            ]
        )
    return columns


def _grid(index: RaggedIndex, image: int, grid: int) -> np.ndarray:
    chosen = torch.zeros(grid * grid, dtype=torch.bool)
    first, last = index.offsets[image : image + 2].tolist()
    chosen[index.patch[first:last].cpu()] = True
    return chosen.view(grid, grid).numpy()
