"""Training and evaluation of linear and attentive probes, with hyperparameters chosen on held-out training images.

Each point of a grid of hyperparameters has its own head, and all heads see the same batches. The head that is best on
the held-out training images is evaluated on the validation images, once and without further training. The control
repeats this, including the choice, with the features of an untrained encoder.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Bool, Int64

from iwm_fast.config.evaluation import ProbeConfig
from iwm_fast.evals.datasets import Comparison, LabelledSamples, open_comparison
from iwm_fast.evals.probing import head_grid
from iwm_fast.evals.probing.extraction import FeatureKind
from iwm_fast.evals.probing.feature_batches import FeatureDataset
from iwm_fast.evals.probing.feature_cache import FeatureCache
from iwm_fast.evals.probing.head_grid import Candidate, HeadGrid
from iwm_fast.evals.results import Result
from iwm_fast.pipelines.config import require
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, rank_zero_only, single_process

log = logging.getLogger(__name__)

BuildGrid = Callable[[FeatureDataset, int, int], HeadGrid]
"""Builds a grid of heads from the training examples, the number of classes and the number of points."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeResult:
    """The results of a probe on the features of one encoder."""

    correct: Bool[np.ndarray, "images"]
    """Whether the best head classifies each validation image correctly."""
    best: Candidate
    candidates: tuple[Candidate, ...]
    num_tuned: int
    """Number of parameters of one head."""
    time_s: float
    """Seconds that training all heads and scoring them on the held-out images took."""


def evaluate_probe(
    task: str,
    config: ProbeConfig,
    kind: FeatureKind,
    build_grid: BuildGrid,
    *,
    max_cache_gb: float | None = None,
    rank_info: RankInfo | None = None,
) -> Result:
    """Probe a run's encoder and its control, and save the result. Collective: every rank must call it.

    All ranks extract features, whose size on disk `max_cache_gb` limits. Rank 0 trains the heads.

    Raises:
        FileNotFoundError, CheckpointError: if the run or the shards cannot be used.
        ShardError: if a sample has no label, one that no training sample has, or an image that cannot be decoded.
        ValueError: if the settings leave no images to train on or to hold out, the features do not fit on the disk, or
            all heads diverge.
    """
    rank_info = rank_info or single_process(config.device)
    comparison = open_comparison(config, rank_info)
    rank_zero_only(lambda: check_holdout(comparison.sets.train, config))
    models, sets = comparison.models, comparison.sets
    cache = FeatureCache(config.run, models, rank_info)
    if max_cache_gb is not None:
        # Checked for all features together before the first are extracted, which can take hours.
        specs = [cache.spec(model, labelled, kind, config.layers) for model in models for labelled in sets]
        rank_zero_only(partial(cache.check_disk_space, specs, max_cache_gb))
    features = [[cache.rows(model, labelled, kind, config.layers) for labelled in sets] for model in models]
    return broadcast_from_rank_zero(lambda: _probe_models(task, config, comparison, features, build_grid))


def check_holdout(train: LabelledSamples, config: ProbeConfig) -> None:
    """Check that there are images to train on and to hold out, and warn if they are too few for the classes.

    Raises:
        ValueError: if there are no images to train on, or none to hold out.
    """
    num_images = len(train.samples)
    fit, held_out = split_holdout(num_images, config.holdout, config.seed)
    accepted = f"leave images to train on and to hold out, of {num_images}; raise max_train_samples or change it"
    require(min(len(fit), len(held_out)) > 0, "holdout", config.holdout, accepted)
    num_classes = len(train.labels.classes)
    num_missing = num_classes - len(np.unique(train.number[fit]))
    if num_missing:
        log.warning("%d of %d classes have no training image; raise max_train_samples", num_missing, num_classes)
    if len(held_out) < num_classes:
        log.warning("only %d images choose hyperparameters for %d classes; raise holdout", len(held_out), num_classes)


def _probe_models(
    task: str, config: ProbeConfig, comparison: Comparison, features: list[list[np.ndarray]], build_grid: BuildGrid
) -> Result:
    results, device = [], comparison.models[0].device
    for arrays in features:
        train, val = (
            FeatureDataset(features=array, label=labelled.number, indices=np.arange(len(array)), device=device)
            for array, labelled in zip(arrays, comparison.sets, strict=True)
        )
        results.append(probe(train, val, len(comparison.sets.classes), build_grid, config))
    _log_if_at_edge(config, results[0].best)
    return _report(task, config, comparison, *results)


def probe(
    train: FeatureDataset, val: FeatureDataset, num_classes: int, build_grid: BuildGrid, config: ProbeConfig
) -> ProbeResult:
    """Train the heads on a share of the training examples, choose the best on the rest and evaluate it on validation.

    Raises:
        DivergenceError: if all heads diverge.
    """
    subsets = split_holdout(len(train), config.holdout, config.seed)
    fit, held_out = (replace(train, indices=train.indices[subset]) for subset in subsets)
    points = head_grid.grid_points(config)
    grid = build_grid(fit, num_classes, len(points))
    begin = time.perf_counter()
    head_grid.train_grid(grid, fit, points, config)
    candidates = head_grid.score_candidates(grid, held_out, points, config.batch_size)
    time_s = time.perf_counter() - begin
    best = head_grid.best_candidate(candidates)
    # Only the best head is applied to the validation images.
    grid.heads = grid.heads[best : best + 1]
    (correct,), _ = head_grid.score_heads(grid, val, config.batch_size)
    num_tuned = sum(parameter.numel() for parameter in grid.heads.parameters())
    return ProbeResult(
        correct=correct, best=candidates[best], candidates=candidates, num_tuned=num_tuned, time_s=time_s
    )


def split_holdout(
    num_examples: int, holdout: float, seed: int
) -> tuple[Int64[np.ndarray, "fit"], Int64[np.ndarray, "held_out"]]:
    """Return random, ascending indices of the examples to train on and of those to hold out."""
    order = np.random.default_rng(seed).permutation(num_examples).astype(np.int64)
    num_held_out = round(holdout * num_examples)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def _log_if_at_edge(config: ProbeConfig, best: Candidate) -> None:
    edges = {max(config.lrs): "larger", min(config.lrs): "smaller"}
    if len(edges) == 2 and best.lr in edges:
        log.info("the best of lrs, %g, is at the edge of the grid; a %s one may be better", best.lr, edges[best.lr])


def _report(
    task: str, config: ProbeConfig, comparison: Comparison, result: ProbeResult, control: ProbeResult
) -> Result:
    subsets = split_holdout(len(comparison.sets.train.samples), config.holdout, config.seed)
    num_fit, num_held_out = (len(subset) for subset in subsets)
    details = {
        "num_fit": num_fit,
        "num_held_out": num_held_out,
        "chosen": asdict(result.best),
        "held_out": [asdict(candidate) for candidate in result.candidates],
        "control_chosen": asdict(control.best),
        "control_held_out": [asdict(candidate) for candidate in control.candidates],
    }
    cost = {"num_tuned": result.num_tuned, "time_s": result.time_s}
    cost["images_per_s"] = config.epochs * num_fit / result.time_s
    return comparison.report(task, config, result.correct, control.correct, details=details, **cost)
