"""What the model saw, long after: the views of a logged step, rendered again and compared with the log."""

from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path, PurePath

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file

from iwm_fast.config.commands import ReplayConfig
from iwm_fast.config.loading import load_run_config
from iwm_fast.config.run import RuntimeConfig, loader_config
from iwm_fast.pipelines.action_log.files import ActionLogError, describe_steps, list_log_files, read_step
from iwm_fast.pipelines.action_log.replay import ReplayPlan
from iwm_fast.pipelines.action_log.schema import LogMetadata, column, read_metadata, to_valid_unicode
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import DataConfig, LoaderConfig, check
from iwm_fast.pipelines.loader import build_loader
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.action import describe_action
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.rendering.image_grid import Panel, save_sheet
from iwm_fast.runtime.distributed import choose_device
from iwm_fast.training.loaders import open_training_shards

_PICTURED = 8


def replay(config: ReplayConfig) -> Path:
    """Render a step's views again and write them as a picture or as tensors; returns the file.

    Raises:
        FileNotFoundError: if the folder holds no run, or its shards are gone.
        ActionLogError: if the log lacks the step, the shards have changed, or something else comes out than was logged.
    """
    run, folder = Path(config.run), Path(config.run) / "actions"
    runtime = load_run_config(run).runtime
    every = list_log_files(folder)
    if config.step is None and every:
        raise ActionLogError(f"step must be one of those in {folder}, {describe_steps(every)}; none was given")
    rows = read_step(folder, config.step or 0)
    head = read_metadata(rows.schema)
    check(config.first_slot < len(rows), "first_slot", config.first_slot, f"lie in 0 .. {len(rows) - 1}")
    rows = rows.slice(config.first_slot, config.num_images or (_PICTURED if config.format == "png" else None))
    shards = open_training_shards(DataConfig(train=config.shards or head.shards, max_samples=head.max_samples))
    require_same_samples(rows, head, shards)
    device = choose_device(config.device or runtime.device)
    batches = rendered_again(rows, head, shards, _loader_config(config, runtime, device), device)
    suffix, save = ("png", _save_picture) if config.format == "png" else ("safetensors", _save_tensors)
    path = Path(config.out or run / f"replay-step-{config.step:08}.{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    save(path, batches, head, f"step {config.step} of {run}, seed {head.seed}")
    return path


def _loader_config(config: ReplayConfig, runtime: RuntimeConfig, device: torch.device) -> LoaderConfig:
    loader = config.backend or runtime.loader
    # decides which decoder an image gets, and so its pixels
    load = runtime.hw_decoder_load if loader == "dali" and device.type == "cuda" else None
    return replace(
        loader_config(runtime), loader=loader, prefetch=1, hw_decoder_load=load, decoder_preallocate=None,
        max_bad_samples=0.0,
    )  # fmt: skip


def require_same_samples(rows: pa.Table, head: LogMetadata, shards: ShardSet) -> None:
    """Check that the shards hold what they held when the rows were written.

    Raises:
        ActionLogError: naming the first row whose sample is another one now, if there is one.
    """
    if shards.content_digest == head.shards_digest:
        return
    remedy = "give the shards, and their kept indexes, as they were when the step was trained (shards=...)"
    named = (rows.column(name).to_pylist() for name in ("sample", "key", "shard", "slot"))
    for sample, key, path, slot in zip(*named, strict=True):
        if sample >= shards.num_samples:
            raise ActionLogError(
                f"sample {sample} ({key!r} of {path}) was in slot {slot}, there are {shards.num_samples} now; {remedy}"
            )
        now = shards.where(sample)
        now_key, now_path = to_valid_unicode(now["key"]), to_valid_unicode(now["shard"])
        if (now_key, PurePath(now_path).name) != (key, PurePath(path).name):
            raise ActionLogError(
                f"sample {sample} in slot {slot} was {key!r} of {path}, it is {now_key!r} of {now_path} now; {remedy}"
            )
    raise ActionLogError(
        f"the shards {head.shards!r} have changed since (other sizes, labels or samples, though not the keys of these "
        f"rows); {remedy}"
    )


def rendered_again(
    rows: pa.Table, head: LogMetadata, shards: ShardSet, config: LoaderConfig, device: torch.device
) -> Iterator[Batch]:
    """Yield a step's rows as batches again, in order, with everything that training received.

    Raises:
        ActionLogError: if a window or an action comes out otherwise than it was logged.
    """
    loader = build_loader(ReplayPlan(head=head, rows=rows), shards, config, device)
    with closing(loader):
        first = 0
        for batch in loader:
            _require_as_logged(batch, rows.slice(first, len(batch.key)))
            first += len(batch.key)
            yield batch


def _require_as_logged(batch: Batch, rows: pa.Table) -> None:
    for name in ("crop_window", "source_window", "action"):
        logged, found = column(rows, name), getattr(batch, name).cpu().numpy()
        differing = np.flatnonzero((logged != found).any(axis=1))
        if len(differing):
            image = differing[0]
            raise ActionLogError(
                f"{name} of step {batch.step}, slot {int(batch.slot[image])}, sample {batch.key[image]!r} is "
                f"{found[image].tolist()}, logged is {logged[image].tolist()}; its image has changed since, or the "
                "version of iwm-fast that reads it differs from the one that trained"
            )


def _save_picture(path: Path, batches: Iterable[Batch], head: LogMetadata, title: str) -> None:
    columns = [column for batch in batches for column in _columns(batch, head)]
    save_sheet(path, ("source view", "target view"), list(zip(*columns, strict=True)), title)


def _columns(batch: Batch, head: LogMetadata) -> Iterator[tuple[Panel, Panel]]:
    source, target, action = (
        values.cpu().numpy()
        for values in (denormalize_view(batch.source_view), denormalize_view(batch.target_view), batch.action)
    )
    for image, key in enumerate(batch.key):
        sample, planned = int(batch.sample[image]), int(batch.scheduled_sample[image])
        stands_in = f", in place of sample {planned}" if planned != sample else ""
        yield (
            Panel(pixels=source[image], caption=f"slot {int(batch.slot[image])}: {to_valid_unicode(key)}{stands_in}"),
            Panel(pixels=target[image], caption=f"action: {describe_action(action[image], head.views)}"),
        )


def _save_tensors(path: Path, batches: Iterable[Batch], head: LogMetadata, title: str) -> None:
    columns = [
        {
            "source_view": denormalize_view(batch.source_view).cpu(),
            "target_view": denormalize_view(batch.target_view).cpu(),
            "action": batch.action.cpu(),
            "slot": batch.slot,
            "sample": batch.sample,
        }
        for batch in batches
    ]
    joined = {name: torch.cat([part[name] for part in columns]) for name in columns[0]}
    save_file(joined, path, {"title": title, "action_entries": ",".join(head.views.entries)})
