"""What linear and attentive probes share: a grid of hyperparameters trained together, chosen on a held-out part.

Every point of the grid has a head of its own and sees the same batches. The point that is best on the held-out part of
the training images is then asked about the validation images, once, as it is. The control goes through the same with
the features of an untrained encoder, and chooses for itself.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Bool, Int64

from iwm_fast.config.evaluation import ProbeConfig
from iwm_fast.evals.datasets import Comparison, Labelled, open_comparison
from iwm_fast.evals.probing.extraction import Kind
from iwm_fast.evals.probing.feature_batches import Examples
from iwm_fast.evals.probing.feature_cache import FeatureCache
from iwm_fast.evals.probing.head_grid import Grid, Tried, choose, points_of, score, train_grid, try_each
from iwm_fast.evals.results import Result
from iwm_fast.pipelines.config import check
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, rank_zero_only, single_process

log = logging.getLogger(__name__)

Build = Callable[[Examples, int, int], Grid]
"""Makes a grid from the examples that are learnt from, the number of classes and the number of points."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probed:
    """What a probe on one encoder has found."""

    correct: Bool[np.ndarray, "images"]
    """Whether the chosen head names each validation image rightly."""
    chosen: Tried
    tried: tuple[Tried, ...]
    num_tuned: int
    """Parameters of one head."""
    time_s: float
    """Training of all heads, and their trial on the held-out part."""


def evaluate_probe(
    task: str,
    config: ProbeConfig,
    kind: Kind,
    build: Build,
    *,
    max_cache_gb: float | None = None,
    rank_info: RankInfo | None = None,
) -> Result:
    """Probe a run's encoder beside its control, and write the result; collective, heads are trained on rank 0.

    Raises:
        FileNotFoundError, CheckpointError: if the run or the shards cannot be used.
        ShardError: if a sample has no label, one that no training sample has, or an image that cannot be decoded.
        ValueError: if settings leave no image to learn from or to choose on, the features need more room than there is,
            or all heads diverge.
    """
    rank_info = rank_info or single_process(config.device)
    compared = open_comparison(config, rank_info)
    rank_zero_only(lambda: require_parts(compared.sets.train, config))
    models, parts = compared.models, compared.sets
    cache = FeatureCache(config.run, models, rank_info)
    if max_cache_gb is not None:
        specs = [cache.spec(model, part, kind) for model in models for part in parts]
        rank_zero_only(partial(cache.require_room, specs, max_cache_gb))
    rows = [[cache.rows(model, part, kind) for part in parts] for model in models]
    return broadcast_from_rank_zero(lambda: _measure(task, config, compared, rows, build))


def require_parts(train: Labelled, config: ProbeConfig) -> None:
    """Check that training images can be split, and say what makes the choice of hyperparameters a weak one.

    Raises:
        ValueError: if one part would be empty.
    """
    fit, held = split(len(train.samples), config.holdout, config.seed)
    accepted = (
        f"leave images to learn from and to choose on, of {len(train.samples)}; raise max_train_samples or change it"
    )
    check(min(len(fit), len(held)) > 0, "holdout", config.holdout, accepted)
    classes = len(train.labels.classes)
    missing = classes - len(np.unique(train.number[fit]))
    if missing:
        log.warning("no image of %d of the %d classes is learnt from: raise max_train_samples", missing, classes)
    if len(held) < classes:
        log.warning("hyperparameters of %d classes are chosen on %d images: raise holdout", classes, len(held))


def _measure(
    task: str, config: ProbeConfig, compared: Comparison, rows: list[list[np.ndarray]], build: Build
) -> Result:
    found = []
    for pair in rows:
        train, val = (
            Examples(rows=part, label=of.number, chosen=np.arange(len(part)), device=compared.models[0].device)
            for part, of in zip(pair, compared.sets, strict=True)
        )
        found.append(probe(train, val, len(compared.sets.classes), build, config))
    _warn_at_edge(config, found[0].chosen)
    return _report(task, config, compared, *found)


def probe(train: Examples, val: Examples, num_classes: int, build: Build, config: ProbeConfig) -> Probed:
    """Train the grid on a part of the training examples, choose on the rest, ask the chosen head about validation.

    Args:
        train: examples to learn and to choose from.
        val: what is looked at once, at the end.
        num_classes: in the labels of both.
        build: makes the grid.
        config: settings.

    Raises:
        ValueError: if all heads diverge.
    """
    parts = split(len(train), config.holdout, config.seed)
    fit, held = (replace(train, chosen=train.chosen[rows]) for rows in parts)
    points = points_of(config)
    grid = build(fit, num_classes, len(points))
    begin = time.perf_counter()
    train_grid(grid, fit, points, config)
    tried = try_each(grid, held, points, config.batch_size)
    time_s = time.perf_counter() - begin
    number = choose(tried)
    # the others are not asked
    grid.heads = grid.heads[number : number + 1]
    correct, _ = score(grid, val, config.batch_size)
    return Probed(
        correct=correct[0],
        chosen=tried[number],
        tried=tried,
        num_tuned=sum(parameter.numel() for parameter in grid.heads.parameters()),
        time_s=time_s,
    )


def split(num_examples: int, holdout: float, seed: int) -> tuple[Int64[np.ndarray, "fit"], Int64[np.ndarray, "held"]]:
    """Return which examples are learnt from, and on which hyperparameters are chosen, both ascending."""
    order = np.random.default_rng(seed).permutation(num_examples).astype(np.int64)
    num_held = round(holdout * num_examples)
    return np.sort(order[num_held:]), np.sort(order[:num_held])


def _warn_at_edge(config: ProbeConfig, chosen: Tried) -> None:
    edges = {max(config.lrs): "larger", min(config.lrs): "smaller"}
    if len(edges) == 2 and chosen.lr in edges:
        log.info("the best of lrs is %g: %s ones may be better still", chosen.lr, edges[chosen.lr])


def _report(task: str, config: ProbeConfig, compared: Comparison, probed: Probed, control: Probed) -> Result:
    num_fit, num_held = (len(part) for part in split(len(compared.sets.train.samples), config.holdout, config.seed))
    return compared.report(
        task,
        config,
        probed.correct,
        control.correct,
        details={
            "num_fit": num_fit,
            "num_held_out": num_held,
            "chosen": asdict(probed.chosen),
            "held_out": [asdict(one) for one in probed.tried],
            "control_chosen": asdict(control.chosen),
            "control_held_out": [asdict(one) for one in control.tried],
        },
        num_tuned=probed.num_tuned,
        images_per_s=config.epochs * num_fit / probed.time_s,
        time_s=probed.time_s,
    )
