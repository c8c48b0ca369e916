"""Planning with the world model: search for the change that leads from one image to another.

The cross-entropy method searches for the action whose prediction from the source is nearest to the target's tokens. On
validation images with a known change, its result is compared with the true action in natural units: the jitter between
a clean image and a version of it, and the destructive transformations that the source has suffered. The baselines are
a guess from the range of the true changes, no change, the same search with an untrained predictor, and a regression
from frozen features, fitted to training images. No choice is made on the validation images.

Crop and flip entries are not searched for, because source and target show the same region.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from iwm_fast.config.evaluation import PlanConfig
from iwm_fast.evals.datasets import compute_sharded, evenly_spaced, require_readable, training_shards, validation_shards
from iwm_fast.evals.planning.cem import distance_to, search, searched_entries, training_prior
from iwm_fast.evals.planning.image_pairs import SOURCE_KINDS, ImagePair, SourceKind, draw_pairs, pooled_features
from iwm_fast.evals.planning.report import PlanningErrors, distance_rows, parameter_rows, recovery_plots
from iwm_fast.evals.planning.ridge import ridge
from iwm_fast.evals.results import Result, Row, name_with_choices, save_result
from iwm_fast.evals.retrieval.bank import open_world_model, with_untrained_predictor
from iwm_fast.pipelines.config import require
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.action import change_from_action, describe_action
from iwm_fast.rendering.charts import RecoveryPlot, save_plots
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, rank_zero_only, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.world_model import WorldModel


def evaluate_plan(config: PlanConfig, rank_info: RankInfo | None = None) -> Result:
    """Measure how well known changes are recovered, and save `plan`, or `plan_difference` with that readout.

    A picture beside the result shows the true and the recovered numbers. Collective: every rank must call it.

    Raises:
        FileNotFoundError, CheckpointError, ShardError: if the run or its shards cannot be used.
        ValueError: if the run's predictor is the identity, or training varies no photometric entry of its actions.
    """
    rank_info = rank_info or single_process(config.device)
    with same_error_on_all_ranks():
        model = open_world_model(config.run, rank_info.device, config.checkpoint, config.size)
        # Fails early if there is nothing to search for.
        training_prior(model.config.views)
        train, val = training_shards(model, config.data), validation_shards(model, config.data)
    selected = [
        (val, evenly_spaced(val.num_samples, config.num_images)),
        (train, evenly_spaced(train.num_samples, config.num_train_images)),
    ]
    broadcast_from_rank_zero(lambda: require_readable(*selected))
    searched = searched_entries(model.config.views)
    rows: list[Row] = []
    plots: list[RecoveryPlot] = []
    for kind in SOURCE_KINDS:
        # Flags say how a source was destroyed, the other entries how a target differs from a clean source.
        is_flag = kind == "destroyed"
        reported = [name for name in searched if model.config.views.all_entries[name].is_flag == is_flag]
        if reported:
            errors = measure(model, train, val, kind, config, rank_info=rank_info)
            rows += parameter_rows(errors, reported, model.config, config.seed)
            rows += distance_rows(errors, kind, config.seed)
            plots += recovery_plots(errors, reported, model.config)
    name = "plan" if config.readout == "absolute" else f"plan_{config.readout}"
    result = Result(
        task="plan", name=name_with_choices(name, config, model.step), rows=tuple(rows), step=model.step,
        seed=config.seed, settings=asdict(config),
        details={"searched": list(searched), "predictions": config.population * config.rounds},
    )  # fmt: skip
    rank_zero_only(lambda: _save(result, plots))
    return result


def _save(result: Result, plots: Sequence[RecoveryPlot]) -> None:
    path = save_result(result.settings["run"], result).with_suffix(".png")
    if plots:
        save_plots(path, plots, f"Changes between pairs of images, {result.name}, step {result.step}")


def measure(
    model: WorldModel, train: ShardSet, val: ShardSet, kind: SourceKind, config: PlanConfig, *, rank_info: RankInfo
) -> PlanningErrors:
    """Return the true changes of validation images with their estimates. Collective: every rank must call it."""
    control = with_untrained_predictor(model, config.seed)
    num_entries, num_features = len(model.config.views.entries), 3 * model.config.model.encoder.dim

    def search_pairs(local: Int64[np.ndarray, "share"]) -> Iterator[Float[Tensor, "columns"]]:
        for pair in draw_pairs(model, val, local, kind=kind, split="val", seed=config.seed):
            yield torch.cat([_search(model, control, pair, config).to(model.device), pooled_features(model, pair)])

    def encode_pairs(local: Int64[np.ndarray, "share"]) -> Iterator[Float[Tensor, "columns"]]:
        for pair in draw_pairs(model, train, local, kind=kind, split="train", seed=config.seed):
            yield torch.cat([torch.from_numpy(pair.action).to(model.device), pooled_features(model, pair)])

    # The results of an image are joined into a vector, because ranks exchange one tensor per image.
    sizes = [num_entries, num_entries, num_entries, 3, 1, num_features]
    samples = evenly_spaced(val.num_samples, config.num_images)
    rows = compute_sharded(samples, search_pairs, (sum(sizes),), f"{kind} sources searched", rank_info)
    *columns, queries = rows.split(sizes, dim=1)
    samples = evenly_spaced(train.num_samples, config.num_train_images)
    shape = (num_entries + num_features,)
    rows = compute_sharded(samples, encode_pairs, shape, "training images encoded", rank_info)
    actions, features = rows.split([num_entries, num_features], dim=1)
    columns.append(ridge(features, actions, queries))
    true, searched, untrained, distance, has_colour, regressed = (column.cpu().numpy() for column in columns)
    return PlanningErrors(
        true=true, searched=searched, untrained=untrained, regressed=regressed, distance=distance,
        has_colour=has_colour[:, 0],
    )  # fmt: skip


def _search(model: WorldModel, control: WorldModel, pair: ImagePair, config: PlanConfig) -> Float[Tensor, "columns"]:
    """Return, joined: actions (true, searched, by the control), distances (searched, true, no change), `has_colour`."""
    prior = training_prior(model.config.views)
    distance, control_distance = (
        distance_to(network, pair.source, pair.target, config.readout) for network in (model, control)
    )
    searched, untrained = (search(function, prior, config, pair.sample) for function in (distance, control_distance))
    other_distances = distance(np.stack([pair.action, np.zeros_like(pair.action)]))
    numbers = [searched.distance, *other_distances, pair.has_colour]
    return torch.from_numpy(
        np.concatenate((pair.action, searched.action, untrained.action, numbers)).astype(np.float32)
    )


@dataclass(frozen=True, kw_only=True)
class PlannedChange:
    """The change that leads from one image file to another according to the world model."""

    change: dict[str, float]
    """The entries that were searched, in natural units."""
    description: str
    """The change in English."""
    distance_before: float
    """Distance of the target's tokens to the prediction for no change."""
    distance_after: float
    """Distance of the target's tokens to the prediction for the change."""

    def __str__(self) -> str:
        distances = f"{self.distance_before:.4f} for no change, {self.distance_after:.4f} for this change"
        return f"{self.description}\ndistance to the target's tokens: {distances}"


def plan_images(config: PlanConfig) -> PlannedChange:
    """Search for the change from `source` to `target`, each cropped to its largest centred square.

    Raises:
        FileNotFoundError: if a file or the run does not exist.
        CheckpointError: if the run's checkpoints are damaged.
        ValueError: if a file is not an image, or the run has no predictor or no entry to search for.
    """
    require(bool(config.source), "source and target", (config.source, config.target), "both name image files")
    model = open_world_model(config.run, single_process(config.device).device, config.checkpoint, config.size)
    prior, views = training_prior(model.config.views), model.config.views
    paths = config.source, config.target
    source, target = (model.load_image(path, max_pixels=config.data.max_pixels) for path in paths)
    distance = distance_to(model, source, target, config.readout)
    result = search(distance, prior, config, sample=0)
    (distance_before,) = distance(np.zeros((1, len(result.action)), np.float32))
    change = change_from_action(result.action[None], views)
    return PlannedChange(
        change={name: float(change[name][0]) for name in searched_entries(views)},
        description=describe_action(result.action, views),
        distance_before=float(distance_before),
        distance_after=result.distance,
    )
