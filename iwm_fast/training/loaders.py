"""Builds loaders from a run's settings: the pretraining stream, the finetuning stream, and evaluation passes."""

import pickle
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64

from iwm_fast.config.batch_size import accumulation_steps
from iwm_fast.config.run import RunConfig, loader_config
from iwm_fast.config.shard_paths import absolute_shards
from iwm_fast.pipelines.action_log.schema import LogMetadata
from iwm_fast.pipelines.config import DataConfig, RandAugmentConfig, SourceConfig, require
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.loader import Loader, build_loader
from iwm_fast.pipelines.sampling.batch_plan import (
    BEGINNING,
    EvaluationPlan,
    FinetunePlan,
    SampleStream,
    StreamStart,
    TrainingPlan,
)
from iwm_fast.pipelines.sampling.mixture import MixedOrder, Source
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.dataset_index import ContentDigest
from iwm_fast.pipelines.storage.shard_set import ShardSet, find_shards, open_shards
from iwm_fast.runtime import distributed
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.runtime.rank_agreement import report_first
from iwm_fast.training.train_state import TrainState

EVALUATION_BATCH_SIZE = 64
"""Images per forward pass in evaluations, where no activations are kept for a backward pass."""


def open_named_shards(setting: str, spec: str, data: DataConfig) -> ShardSet:
    """Open the shards that a setting names, with the choice and limit of images in `data`.

    If some are missing, the error names the setting as the remedy.
    """
    try:
        return open_shards(spec, data.image, max_pixels=data.max_pixels)
    except FileNotFoundError as error:
        is_same = absolute_shards(spec) == spec
        base = "" if is_same else f"; relative paths start from {Path.cwd()}"
        error.add_note(f"if the shards have moved, set {setting} to their current location{base}")
        raise


def open_training_shards(data: DataConfig) -> ShardSet:
    """Open data.train, truncated to the first data.max_samples samples if that is set.

    Raises:
        ValueError: if data.train is empty or has fewer samples than data.max_samples.
        FileNotFoundError, ShardError: if a shard is missing or cannot be used.
    """
    if not data.train:
        raise ValueError(
            "data.train must name the training shards, got ''; for example data.train='shards/{000..099}.tar'"
        )
    shards = open_named_shards("data.train", data.train, data)
    if data.mixture:
        return replace(shards, source_shards=tuple(_count_shards(source, shards) for source in data.mixture))
    if data.max_samples is None:
        return shards
    require(data.max_samples <= shards.num_samples, "data.max_samples", data.max_samples,
          f"be at most the {shards.num_samples} samples of data.train, or unset")  # fmt: skip
    return shards.truncated(data.max_samples)


def _count_shards(source: SourceConfig, shards: ShardSet) -> int:
    """Return how many of the shards of a mixture belong to a source.

    Raises:
        ValueError: if none of them holds an image.
    """
    paths = set(find_shards(source.shards))
    count = sum(path in paths for path in shards.paths)
    accepted = "hold samples; none of them holds an image. Correct it or leave the source out"
    require(count > 0, f"shards of source {source.name!r} in data.train", source.shards, accepted)
    return count


def open_training_shards_on_all_ranks(data: DataConfig, rank_info: RankInfo) -> ShardSet:
    """Open data.train as `open_on_all_ranks` does, with the same content on all machines. Collective.

    Raises:
        ValueError, FileNotFoundError, ShardError: if a shard is missing or cannot be used, or differs from rank 0's.
        PeerFailedError: on the other ranks.
    """
    return open_on_all_ranks(f"data.train = {data.train!r}", data, partial(open_training_shards, data), rank_info)


def open_on_all_ranks(name: str, data: DataConfig, open_here: Callable[[], ShardSet], rank_info: RankInfo) -> ShardSet:
    """Open shards on each machine, with the same content everywhere. Collective: every rank must call it.

    The first rank of each machine looks at the shards, which may be others on another machine, and the machine's other
    ranks map its index. A rank whose settings differ, or that does not see that index, opens the shards itself.

    Args:
        name: setting that names the shards, and its value, for messages.
        data: settings of this rank's data.
        open_here: opens the shards on this machine.
        rank_info: this process.

    Raises:
        ValueError: if shards differ from those of rank 0.
        Exception: on rank 0, whatever `open_here` raised.
        PeerFailedError: on the other ranks.
    """
    shards, problem = distributed.rank_zero_only(open_here), ""
    if rank_info.rank > 0 and rank_info.local_rank == 0:
        shards, problem = _try_to_open(open_here)
    place = (socket.gethostname(), data)
    # Pickled, because a set that is received is mapped at once, and only those of its machine can be.
    offers = distributed.gather_objects((place, shards and pickle.dumps(shards)))
    if shards is None and not problem:
        offer = next((content for origin, content in offers if content and origin == place), None)
        shards, problem = _try_to_open(lambda: pickle.loads(offer) if offer else open_here())
    digests = distributed.gather_objects(shards and shards.sources_digest)
    if any(digest != digests[0] for digest in digests):
        difference = _describe_difference(shards)
        problem = problem or ("" if digests[rank_info.rank] == digests[0] else difference)
    where = f"{name} on rank {rank_info.rank}"
    report_first(distributed.gather_objects(problem and f"{where}: {problem}; copy the shards of rank 0"))
    assert shards is not None, "otherwise there is a problem"
    return shards


def _try_to_open(function: Callable[[], ShardSet]) -> tuple[ShardSet | None, str]:
    """Return what a function opens, or None and what is wrong with the shards."""
    try:
        return function(), ""
    except (ValueError, OSError, ShardError) as error:
        return None, str(error)


def _describe_difference(shards: ShardSet | None) -> str:
    """Return how the shards of this rank, whose digest is another one, differ from rank 0's.

    Collective: every rank must call it, with None if it has no shards.
    """
    own = [ContentDigest().add(shard).text() for shard in shards.shards] if shards else []
    first = distributed.broadcast_from_rank_zero(lambda: own)
    if shards is None:
        return ""
    if len(own) != len(first):
        return f"{len(own)} shards, but {len(first)} on rank 0"
    number = next((number for number, digest in enumerate(own) if digest != first[number]), None)
    if number is None:
        return "its sources have other numbers of shards than those of rank 0"
    return f"{shards.shards[number].path} has other samples than shard {number + 1} of rank 0"


def training_loader(
    config: RunConfig, shards: ShardSet, rank_info: RankInfo, first_step: int = 0, start: StreamStart = BEGINNING
) -> Loader:
    """Build this rank's endless stream of micro-batches for pretraining, from `first_step` on.

    `start` is where the stream of samples begins, which differs from the default after a restarted epoch.
    """
    plan = TrainingPlan(
        views=config.views,
        mask=config.mask,
        seed=config.seed,
        grid=config.grid,
        stream=training_stream(config, shards, rank_info, start),
    )
    return _build_from_step(plan, config, shards, rank_info, first_step)


def _build_from_step(
    plan: TrainingPlan | FinetunePlan, config: RunConfig, shards: ShardSet, rank_info: RankInfo, first_step: int
) -> Loader:
    """Build the loader of a plan, from an optimiser step on."""
    # Loaders count micro-batches.
    _, accumulation = accumulation_steps(config, rank_info.world_size)
    return build_loader(
        plan,
        shards,
        loader_config(config.runtime),
        rank_info.device,
        first=first_step * accumulation,
        normalization=config.data.normalization,
    )


def finetune_loader(
    config: RunConfig, augment: RandAugmentConfig | None, shards: ShardSet, rank_info: RankInfo, first_step: int = 0
) -> Loader:
    """Build this rank's endless stream of micro-batches for finetuning, from `first_step` on.

    An image is one randomly flipped crop, with RandAugment applied unless `augment` is None.
    """
    plan = FinetunePlan(
        views=config.views,
        augment=augment,
        seed=config.seed,
        grid=config.grid,
        stream=training_stream(config, shards, rank_info, BEGINNING),
    )
    return _build_from_step(plan, config, shards, rank_info, first_step)


def training_stream(config: RunConfig, shards: ShardSet, rank_info: RankInfo, start: StreamStart) -> SampleStream:
    """Return this rank's part of the shuffled, endless sequence of training samples."""
    micro_batch_size, _ = accumulation_steps(config, rank_info.world_size)
    return SampleStream(
        order=mixed_order(config, shards) if config.data.mixture else _order(config, np.diff(shards.shard_bounds)),
        global_batch_size=config.optim.global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank_info.rank,
        world_size=rank_info.world_size,
        start=start,
    )


def mixed_order(config: RunConfig, shards: ShardSet) -> MixedOrder:
    """Return the order of a run whose data.train is a mixture."""
    bounds = np.cumsum([0, *shards.source_shards])
    sources = []
    for source, begin, end in zip(config.data.mixture, bounds[:-1], bounds[1:], strict=True):
        own = shards.shard_bounds[begin : end + 1]
        order = _order(config, np.diff(own), source.name)
        sources.append(Source(name=source.name, weight=source.weight, order=order, first_sample=int(own[0])))
    return MixedOrder(sources, config.seed)


def _order(config: RunConfig, shard_sizes: Int64[np.ndarray, "shards"], name: str = "") -> SampleOrder:
    return SampleOrder(shard_sizes, config.seed, config.data.shuffle_window, name=name)


def source_epochs(config: RunConfig, shards: ShardSet, state: TrainState) -> dict[str, float]:
    """Return how often the sources of a mixture have been seen, as metrics; none if data.train is not a mixture."""
    if not config.data.mixture:
        return {}
    position = state.start.position_of(state.step, config.optim.global_batch_size)
    return {f"data/epochs_{name}": epochs for name, epochs in mixed_order(config, shards).epochs(position).items()}


def log_metadata(config: RunConfig, shards: ShardSet) -> LogMetadata:
    """Return the run's settings that an action log stores once, so that its rows can be rendered again."""
    return LogMetadata(
        views=config.views,
        mask=config.mask,
        seed=config.seed,
        grid=config.grid,
        global_batch_size=config.optim.global_batch_size,
        # Absolute as in config.yaml, so that `iwm replay` finds them from any working directory.
        shards=absolute_shards(config.data.train),
        max_samples=config.data.max_samples,
        image=config.data.image,
        max_pixels=config.data.max_pixels,
        shards_digest=shards.content_digest,
    )


def evaluation_loader(
    config: RunConfig,
    shards: ShardSet,
    samples: np.ndarray,
    device: torch.device,
    *,
    leaves_out_bad_samples: bool = False,
) -> Loader:
    """Build one pass over the samples with these numbers.

    An image is its largest centred square without transformations; all patches are context. A sample that cannot be
    decoded is an error, unless bad samples are left out: then another one replaces it, and the caller drops the images
    whose `sample` differs from `scheduled_sample`.
    """
    plan = EvaluationPlan(
        views=config.views,
        grid=config.grid,
        samples=samples,
        micro_batch_size=EVALUATION_BATCH_SIZE,
        leaves_out_bad_samples=leaves_out_bad_samples,
    )
    runtime = config.runtime
    if leaves_out_bad_samples:
        runtime = replace(runtime, max_bad_samples=float(shards.num_samples))
    return build_loader(plan, shards, loader_config(runtime), device, normalization=config.data.normalization)
