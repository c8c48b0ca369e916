"""`iwm show`: draw views, masks and actions of the first training samples, before any training."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8

from iwm_fast.config.run import RunConfig
from iwm_fast.config.writable import require_writable
from iwm_fast.pipelines.batch import Batch, RaggedIndex
from iwm_fast.pipelines.errors import printable
from iwm_fast.pipelines.transforms.action import describe_action
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.rendering.image_grid import Panel, save_image_grid, shade
from iwm_fast.runtime.distributed import RankInfo, choose_device
from iwm_fast.training.loaders import open_training_shards, training_loader

_MAX_IMAGES = 8


def show_batch(config: RunConfig) -> Path:
    """Write `show.png` into the run folder and return its path.

    The picture shows the first images of training, a column each: views, visible patches and patches to predict. Lines
    separate the patches.
    """
    require_writable("output.folder", config.output.folder)
    path = Path(config.output.folder) / "show.png"
    labels = ("source view", "visible patches", "target view", "patches to predict")
    title = f"First training samples of {config.data.train}, seed {config.seed}"
    save_image_grid(path, labels, list(zip(*_first_columns(config), strict=True)), title)
    return path


def _first_columns(config: RunConfig) -> list[list[Panel]]:
    """Return four panels for each of the first images of training."""
    # The first images of small micro-batches are those of the run's, which may be thousands of images.
    global_batch_size = config.optim.global_batch_size
    size = max(size for size in range(1, _MAX_IMAGES + 1) if global_batch_size % size == 0)
    small = replace(config, runtime=replace(config.runtime, micro_batch_size=size))
    rank_info = RankInfo(rank=0, local_rank=0, world_size=1, device=choose_device(config.runtime.device))
    columns = []
    with closing(training_loader(small, open_training_shards(config.data), rank_info)) as loader:
        while len(columns) < min(_MAX_IMAGES, global_batch_size):
            columns += _columns(next(loader), config)
    return columns[:_MAX_IMAGES]


def _columns(batch: Batch, config: RunConfig) -> list[list[Panel]]:
    """Return four panels for each image of a batch."""
    views = (batch.source_view, batch.target_view)
    sources, targets = (denormalize_view(view, config.data.normalization).cpu().numpy() for view in views)
    columns = []
    for image in range(len(batch.key)):
        context = _patch_mask(batch.context, image, config.grid)
        target = _patch_mask(batch.target, image, config.grid)
        action = describe_action(batch.action[image].cpu().numpy(), config.views)
        columns.append(
            [
                Panel(pixels=sources[image], caption=printable(batch.key[image])),
                _masked_panel(sources[image], context),
                Panel(pixels=targets[image], caption=f"action: {action}"),
                _masked_panel(targets[image], target),
            ]
        )
    return columns


def _masked_panel(pixels: UInt8[np.ndarray, "H W 3"], is_selected: Bool[np.ndarray, "grid grid"]) -> Panel:
    """Return a panel of the selected patches, with lines between all patches."""
    caption = f"{is_selected.sum()} of {is_selected.size} patches"
    return Panel(pixels=shade(pixels, ~is_selected), caption=caption, grid=len(is_selected))


def _patch_mask(index: RaggedIndex, image: int, grid: int) -> Bool[np.ndarray, "grid grid"]:
    """Return which patches of an image the index selects."""
    mask = torch.zeros(grid * grid, dtype=torch.bool)
    begin, end = index.offsets[image : image + 2].tolist()
    mask[index.patch[begin:end].cpu()] = True
    return mask.view(grid, grid).numpy()
