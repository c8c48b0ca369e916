"""`iwm replay`: render the views of a logged training step again and compare them with the action log."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path, PurePath

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor

from iwm_fast.config.commands import ReplayConfig
from iwm_fast.config.loading import load_run_config
from iwm_fast.config.run import RuntimeConfig, loader_config
from iwm_fast.pipelines.action_log.files import ActionLogError, describe_steps, list_log_files, read_step
from iwm_fast.pipelines.action_log.replay import ReplayPlan
from iwm_fast.pipelines.action_log.schema import LogMetadata, column, read_metadata
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import IMAGENET, DataConfig, LoaderConfig, require
from iwm_fast.pipelines.errors import printable, to_valid_unicode
from iwm_fast.pipelines.loader import build_loader
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.action import describe_action
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.rendering.image_grid import Panel, save_image_grid
from iwm_fast.runtime.distributed import choose_device
from iwm_fast.training.loaders import open_training_shards

# Images of a PNG if `num_images` is not set.
_NUM_IMAGES = 8


def replay_step(config: ReplayConfig) -> Path:
    """Render the views of a step again, write them as a picture or as tensors, and return the path of the file.

    Raises:
        FileNotFoundError: if the folder holds no run, or the shards do not exist.
        ActionLogError: if the log lacks the step, the shards have changed, or windows or actions differ from the log.
    """
    run, folder = Path(config.run), Path(config.run) / "actions"
    runtime = load_run_config(run).runtime
    log_files = list_log_files(folder)
    if config.step is None and log_files:
        raise ActionLogError(f"step must be one of the steps in {folder}, {describe_steps(log_files)}, but is not set")
    # Without any log files, `read_step` raises for every step and explains how to get a log.
    rows = read_step(folder, config.step or 0)
    # Settings come from the log and not from the run's config.yaml, which a later restart may have changed.
    metadata = read_metadata(rows.schema)
    require(config.first_slot < len(rows), "first_slot", config.first_slot, f"lie in 0 .. {len(rows) - 1}")
    rows = rows.slice(config.first_slot, config.num_images or (_NUM_IMAGES if config.format == "png" else None))
    data = DataConfig(
        train=config.shards or metadata.shards,
        max_samples=metadata.max_samples,
        image=metadata.image,
        max_pixels=metadata.max_pixels,
    )
    shards = open_training_shards(data)
    require_same_samples(rows, metadata, shards)
    device = choose_device(config.device or runtime.device)
    batches = render_again(rows, metadata, shards, _loader_config(config, runtime, device), device)
    suffix, save = ("png", _save_picture) if config.format == "png" else ("safetensors", _save_tensors)
    path = Path(config.out or run / f"replay-step-{config.step:08}.{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, batches, metadata, f"step {config.step} of {run}, seed {metadata.seed}")
    return path


def _loader_config(config: ReplayConfig, runtime: RuntimeConfig, device: torch.device) -> LoaderConfig:
    """Return the run's loader settings, changed for rendering one step of known samples."""
    loader = config.backend or runtime.loader
    # This share decides which images the GPU's JPEG decoder takes. Its pixels differ from those of the CPU's decoder.
    load = runtime.hw_decoder_load if loader == "dali" and device.type == "cuda" else None
    # No sample may be replaced: the log names the samples that training saw after bad ones were replaced.
    return replace(
        loader_config(runtime), loader=loader, prefetch=1, hw_decoder_load=load, decoder_preallocate=None,
        max_bad_samples=0.0,
    )  # fmt: skip


def require_same_samples(rows: pa.Table, metadata: LogMetadata, shards: ShardSet) -> None:
    """Check that the shards hold the samples that they held when the rows were logged.

    Raises:
        ActionLogError: if they do not; the message names the first row that refers to another sample now, if any does.
    """
    if shards.content_digest == metadata.shards_digest:
        return
    remedy = "set shards=... to the shards, with their saved indexes, as they were when the step was trained"
    columns = (rows.column(name).to_pylist() for name in ("sample", "key", "shard", "slot"))
    for sample, key, path, slot in zip(*columns, strict=True):
        if sample >= shards.num_samples:
            raise ActionLogError(
                f"slot {slot} had sample {sample} ({key!r} of {path}), "
                f"but there are only {shards.num_samples} samples now; {remedy}"
            )
        current = shards.shard_and_key(sample)
        current_key, current_path = to_valid_unicode(current["key"]), to_valid_unicode(current["shard"])
        # Folders are not compared, as the shards may have been moved.
        if (current_key, PurePath(current_path).name) != (key, PurePath(path).name):
            raise ActionLogError(
                f"sample {sample} in slot {slot} was {key!r} of {path}, now {current_key!r} of {current_path}; {remedy}"
            )
    raise ActionLogError(
        f"the shards {metadata.shards!r} have changed since the step was trained (sizes, labels or samples, but not "
        f"the keys of these rows); {remedy}"
    )


def render_again(
    rows: pa.Table, metadata: LogMetadata, shards: ShardSet, config: LoaderConfig, device: torch.device
) -> Iterator[Batch]:
    """Yield the rows of a step as batches, in order, with everything that training received.

    Raises:
        ActionLogError: if a window or an action differs from the log.
    """
    loader = build_loader(ReplayPlan(head=metadata, rows=rows), shards, config, device)
    with closing(loader):
        first = 0
        for batch in loader:
            _require_equal_to_log(batch, rows.slice(first, len(batch.key)))
            first += len(batch.key)
            yield batch


def _require_equal_to_log(batch: Batch, rows: pa.Table) -> None:
    # Windows depend on the size of the stored image and actions on the drawn parameters, so they reveal another image
    # or another version of the transformations. Both are logged as float32 and must be equal bit for bit.
    for name in ("crop_window", "source_window", "action"):
        logged, rendered = column(rows, name), getattr(batch, name).cpu().numpy()
        differing = np.flatnonzero((logged != rendered).any(axis=1))
        if len(differing):
            image = differing[0]
            raise ActionLogError(
                f"{name} of step {batch.step}, slot {int(batch.slot[image])}, sample {batch.key[image]!r} is "
                f"{rendered[image].tolist()}, but the log has {logged[image].tolist()}; either the image has changed "
                "since, or this version of iwm-fast differs from the one that trained the run"
            )


def _pixels(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the pixels of both views, which do not depend on what they are normalised with in between."""
    return denormalize_view(batch.source_view, IMAGENET), denormalize_view(batch.target_view, IMAGENET)


def _save_picture(path: Path, batches: Iterable[Batch], metadata: LogMetadata, title: str) -> None:
    columns = [column for batch in batches for column in _columns(batch, metadata)]
    save_image_grid(path, ("source view", "target view"), list(zip(*columns, strict=True)), title)


def _columns(batch: Batch, metadata: LogMetadata) -> Iterator[tuple[Panel, Panel]]:
    """Yield the source view and the target view of each image, with slot, key and action as captions."""
    sources, targets, actions = (values.cpu().numpy() for values in (*_pixels(batch), batch.action))
    for image, key in enumerate(batch.key):
        sample, scheduled = int(batch.sample[image]), int(batch.scheduled_sample[image])
        replacement = f", replaces sample {scheduled}" if scheduled != sample else ""
        name = f"slot {int(batch.slot[image])}: {printable(key)}{replacement}"
        action = f"action: {describe_action(actions[image], metadata.views)}"
        yield Panel(pixels=sources[image], caption=name), Panel(pixels=targets[image], caption=action)


def _save_tensors(path: Path, batches: Iterable[Batch], metadata: LogMetadata, title: str) -> None:
    parts = [
        {
            **dict(zip(("source_view", "target_view"), (view.cpu() for view in _pixels(batch)), strict=True)),
            "action": batch.action.cpu(),
            "slot": batch.slot,
            "sample": batch.sample,
        }
        for batch in batches
    ]
    tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    save_file(tensors, path, {"title": title, "action_entries": ",".join(metadata.views.entries)})
