"""Planning with the world model: search the change that leads from one image to another.

The action whose prediction from the source is nearest to the target's tokens is searched for by the cross-entropy
method. On validation images whose change is known, what comes out is compared with what was done, in natural units:
jitter between the untouched image and a version of it, and which destructions a source has suffered. Beside it stand a
guess from the range of what was drawn, doing nothing, the same search through an untrained predictor, and a regression
on frozen features, which learnt from training images. Nothing is chosen on the validation images.

Where in the image the source lies is not searched for: source and target show the same place.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from iwm_fast.config.evaluation import PlanConfig
from iwm_fast.evals.datasets import compute_rows, spread, training_shards, validation_shards
from iwm_fast.evals.planning.cem import FLAGS, distance_to, search, searched_entries, training_prior
from iwm_fast.evals.planning.image_pairs import KINDS, Kind, Task, draw_tasks, pooled
from iwm_fast.evals.planning.report import Outcome, distance_rows, parameter_rows
from iwm_fast.evals.planning.ridge import ridge
from iwm_fast.evals.results import Result, Row, name_with_step, save_result
from iwm_fast.evals.retrieval.bank import open_world_model, with_untrained_predictor
from iwm_fast.pipelines.config import check
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.action import action_difference, describe_action
from iwm_fast.pipelines.transforms.parameters import JITTER
from iwm_fast.runtime.distributed import RankInfo, rank_zero_only, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.world_model import WorldModel


def evaluate_plan(config: PlanConfig, rank_info: RankInfo | None = None) -> Result:
    """Measure how well the change between two images is recovered; write `plan`; collective.

    Raises:
        FileNotFoundError, CheckpointError, ShardError: if the run or its shards cannot be used.
        ValueError: if the run's predictor is the identity, or its actions have no photometric entry.
    """
    rank_info = rank_info or single_process(config.device)
    with same_error_on_all_ranks():
        model = open_world_model(config.run, rank_info.device, config.checkpoint)
        training_prior(model.config.views)
        train, val = training_shards(model, config.data), validation_shards(model, config.data)
    searched = searched_entries(model.config.views)
    rows: list[Row] = []
    for kind, entries in zip(KINDS, (JITTER, FLAGS), strict=True):
        asked = [name for name in searched if name in entries]
        if asked:
            outcome = measure(model, train, val, kind, config, rank_info=rank_info)
            rows += parameter_rows(outcome, asked, model.config, config.seed)
            rows += distance_rows(outcome, kind, config.seed)
    result = Result(
        task="plan", name=name_with_step("plan", config.checkpoint, model.step), rows=tuple(rows), step=model.step,
        seed=config.seed, settings=asdict(config),
        details={"searched": list(searched), "predictions": config.population * config.rounds},
    )  # fmt: skip
    rank_zero_only(lambda: save_result(config.run, result))
    return result


def measure(
    model: WorldModel, train: ShardSet, val: ShardSet, kind: Kind, config: PlanConfig, *, rank_info: RankInfo
) -> Outcome:
    """Return what was done to the validation images, and what search and regression say was done; collective."""
    control = with_untrained_predictor(model, config.seed)
    num_actions, num_features = len(model.config.views.entries), 3 * model.config.model.encoder.dim

    def searched(local: Int64[np.ndarray, "share"]) -> Iterator[Float[Tensor, "row"]]:
        for task in draw_tasks(model, val, local, kind=kind, split="val", seed=config.seed):
            yield torch.cat([_search(model, control, task, config).to(model.device), pooled(model, task)])

    def examples(local: Int64[np.ndarray, "share"]) -> Iterator[Float[Tensor, "row"]]:
        for task in draw_tasks(model, train, local, kind=kind, split="train", seed=config.seed):
            yield torch.cat([torch.from_numpy(task.action).to(model.device), pooled(model, task)])

    sizes = [num_actions, num_actions, num_actions, 3, 1, num_features]
    samples = spread(val.num_samples, config.num_images)
    rows = compute_rows(samples, searched, (sum(sizes),), f"{kind} sources searched", rank_info)
    *parts, asked = rows.split(sizes, dim=1)
    samples = spread(train.num_samples, config.num_train_images)
    rows = compute_rows(samples, examples, (num_actions + num_features,), "training images encoded", rank_info)
    answers, known = rows.split([num_actions, num_features], dim=1)
    done, found, untrained, distance, has_colour, regressed = (
        part.cpu().numpy() for part in (*parts, ridge(known, answers, asked))
    )
    return Outcome(
        done=done,
        found=found,
        untrained=untrained,
        regressed=regressed,
        distance=distance,
        has_colour=has_colour[:, 0],
    )


def _search(model: WorldModel, control: WorldModel, task: Task, config: PlanConfig) -> Float[Tensor, "row"]:
    """Return actions (done, found, found by the control), distances (found, done, no change) and whether has colour."""
    prior = training_prior(model.config.views)
    distance = distance_to(model, task.source, task.target)
    found = search(distance, prior, config, task.sample)
    untrained = search(distance_to(control, task.source, task.target), prior, config, task.sample)
    others = distance(np.stack([task.action, np.zeros_like(task.action)]))
    row = (task.action, found.action, untrained.action, [found.distance, *others, task.has_colour])
    return torch.from_numpy(np.concatenate(row).astype(np.float32))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The change that leads from one image file to another, as the world model sees it."""

    change: dict[str, float]
    """Differences of factors, hue in turns, 1 for a destruction that the source has suffered; what is not named was
    not searched for."""
    words: str
    """The same, said."""
    distance_before: float
    """Of the target's tokens and the prediction that nothing changes."""
    distance_after: float
    """Of the target's tokens and the prediction for the change."""

    def __str__(self) -> str:
        distances = f"{self.distance_before:.4f} for no change, {self.distance_after:.4f} for this"
        return f"{self.words}\ndistance to the target's tokens: {distances}"


def plan_images(config: PlanConfig) -> Plan:
    """Search the change from `source` to `target`, both cut to their largest centred square.

    Raises:
        FileNotFoundError: if one of the files, or the run, does not exist.
        ValueError: if one of them is no image, or the run has nothing to search with.
    """
    check(bool(config.source), "source and target", (config.source, config.target), "both name image files")
    model = open_world_model(config.run, single_process(config.device).device, config.checkpoint)
    prior, views = training_prior(model.config.views), model.config.views
    distance = distance_to(model, model.load_image(config.source), model.load_image(config.target))
    found = search(distance, prior, config, sample=0)
    (before,) = distance(np.zeros((1, len(found.action)), np.float32))
    natural = action_difference(found.action[None], views)
    return Plan(
        change={name: float(natural[name][0]) for name in searched_entries(views)},
        words=describe_action(found.action, views),
        distance_before=float(before),
        distance_after=found.distance,
    )
