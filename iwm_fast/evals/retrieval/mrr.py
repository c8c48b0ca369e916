"""Mean reciprocal rank of the predicted change among jittered versions of the image.

A source image and the action that leads to one member of its bank go in; the members are ranked by squared distance of
token maps to the prediction, and every member is asked for once. Jitter is asked forward, from the untouched image.
Grayscale, blur and solarize are asked backward, from the image they destroyed, with their flag set: only a source is
ever destroyed in training, so no predictor was taught the way from clean to destroyed, and asking it would measure
nothing. Ties share their middle rank, so a predictor that ignores the action scores near chance, never 0. Source: paper
section 4; the families' directions are ours.

Images are taken one after the other and keep nothing but their ranks, so memory grows with the bank (two token maps for
each member), not with the number of images. On many ranks each takes its share of them.
"""

import logging
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32, Int64, UInt8
from pyarrow import parquet
from torch import Tensor

from iwm_fast.config.evaluation import MrrConfig
from iwm_fast.evals.datasets import clean_images, compute_rows, spread, validation_shards
from iwm_fast.evals.results import Result, Row, mean_row, name_with_step, save_result
from iwm_fast.evals.retrieval.bank import (
    Bank,
    ask,
    bank_views,
    distances,
    draw_bank,
    open_world_model,
    predicted_map,
    ranks,
    source_photometry,
    target_map,
    with_untrained_predictor,
)
from iwm_fast.pipelines.config import ViewConfig
from iwm_fast.pipelines.storage.atomic import replace_file
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.parameters import JITTER
from iwm_fast.runtime.distributed import RankInfo, rank_zero_only, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)


def evaluate_mrr(config: MrrConfig, rank_info: RankInfo | None = None) -> Result:
    """Score a run beside chance and an untrained predictor on the same encoder; write `mrr_<bank>`; collective.

    The single ranks stand beside the result in `mrr_<bank>_ranks.parquet`. Families that the run was not taught, or
    whose flag its actions do not have, are measured like the others, and named.

    Raises:
        FileNotFoundError, CheckpointError, ShardError: if the run or its shards cannot be used.
        ValueError: if the run's predictor is the identity.
    """
    rank_info = rank_info or single_process(config.device)
    with same_error_on_all_ranks():
        model = open_world_model(config.run, rank_info.device, config.checkpoint)
        shards = validation_shards(model, config.data)
    samples = spread(shards.num_samples, config.num_images)
    models = [model, with_untrained_predictor(model, config.seed)]
    shape = len(models), len(config.families), config.bank_size

    def ranked(local: Int64[np.ndarray, "share"]) -> Iterator[Tensor]:
        return map(torch.from_numpy, bank_ranks(models, shards, local, config))

    rank, control = compute_rows(samples, ranked, shape, "images ranked", rank_info).cpu().numpy().swapaxes(0, 1)
    result = _result(rank, control, model, config)
    keys = [shards.key(int(sample)) for sample in samples]
    rank_zero_only(lambda: _save(result, keys, rank, control))
    return result


def bank_ranks(
    models: list[WorldModel], shards: ShardSet, samples: Int64[np.ndarray, "images"], config: MrrConfig
) -> Iterator[Float32[np.ndarray, "models families M"]]:
    """Yield for each image the ranks of the right answers, in the same bank for all models and families.

    The models share their encoder: it is the predictors that are compared. Nothing here waits for other ranks.
    """
    for pixels, sample in clean_images(models[0], shards, samples):
        bank = draw_bank(pixels, sample, config.bank_size, model=models[0], strengths=config.bank, seed=config.seed)
        yield ranks_in_bank(models, pixels, bank, config)


def ranks_in_bank(
    models: list[WorldModel], pixels: UInt8[Tensor, "H W 3"], bank: Bank, config: MrrConfig
) -> Float32[np.ndarray, "models families M"]:
    """Return the ranks of the right answers in one image's bank."""
    target = target_map(models[0], bank)
    questions = [ask(pixels, bank, family, models[0]) for family in config.families]
    return np.array(
        [[ranks(distances(predicted_map(model, asked), target)) for asked in questions] for model in models]
    )


def chance(bank_size: int) -> float:
    """Return the expected reciprocal rank of a random order: the harmonic number over the bank's size."""
    return float((1 / np.arange(1, bank_size + 1)).mean())


def mean_reciprocal(rank: Float32[np.ndarray, "images *rest M"]) -> float:
    """Return the mean reciprocal rank, each image's mean first."""
    return float((1 / rank.astype(np.float64)).mean(axis=-1).mean())


def _result(
    rank: Float32[np.ndarray, "images families M"],
    control: Float32[np.ndarray, "images families M"],
    model: WorldModel,
    config: MrrConfig,
) -> Result:
    rows: list[Row] = []
    for place, family in enumerate(config.families):
        rows += _rows(family, rank[:, place], control[:, place], config.seed)
    views = model.config.views
    strengths = bank_views(views, config.bank)
    name = name_with_step(f"mrr_{config.bank}", config.checkpoint, model.step)
    details = {
        "bank_strengths": {name: getattr(strengths, name) for name in JITTER},
        "blur_sigma": float(source_photometry("blur", views).blur_sigma[0]),
        **_strange(config, views),
        "ranks": f"{name}_ranks.parquet",
    }
    return Result(
        task="mrr", name=name, rows=tuple(rows), step=model.step, seed=config.seed,
        settings=asdict(config), details=details,
    )  # fmt: skip


def _rows(
    family: str, rank: Float32[np.ndarray, "images M"], control: Float32[np.ndarray, "images M"], seed: int
) -> list[Row]:
    size = rank.shape[1]
    scores = {
        "mrr": (lambda place: 1 / place, chance(size)),
        "recall_at_1": (lambda place: place <= 1, 1 / size),
        "recall_at_5": (lambda place: place <= 5, min(1.0, 5 / size)),
    }
    return [
        # banks differ by image, members of one bank are not independent
        mean_row(subject=family, metric=metric, values=score(rank.astype(np.float64)).mean(axis=1), seed=seed,
                 control=score(control.astype(np.float64)), control_name="untrained predictor", chance=by_chance)
        for metric, (score, by_chance) in scores.items()
    ]  # fmt: skip


def _strange(config: MrrConfig, views: ViewConfig) -> dict[str, list[str]]:
    """Say which families the run cannot be expected to know."""
    flags = [family for family in config.families if family != "jitter"]
    untold = [family for family in flags if family not in views.entries]
    untaught = [family for family in flags if getattr(views, f"{family}_probability") == 0]
    for names, why in ((untold, "its actions do not tell"), (untaught, "it never saw in training")):
        if names:
            log.warning("the run is asked about %s, which %s", " and ".join(names), why)
    return {"not_in_action": untold, "not_in_training": untaught}


def _save(
    result: Result,
    keys: list[str],
    rank: Float32[np.ndarray, "images families M"],
    control: Float32[np.ndarray, "images families M"],
) -> None:
    """Write the result, and one row per image, family and member beside it."""
    _, num_families, size = rank.shape
    columns = {
        "key": np.repeat(keys, num_families * size),
        "family": np.tile(np.repeat(result.settings["families"], size), len(keys)),
        "member": np.tile(np.arange(size, dtype=np.int32), len(keys) * num_families),
        "rank": rank.ravel(),
        "rank_untrained": control.ravel(),
    }
    path = save_result(result.settings["run"], result).with_name(result.details["ranks"])
    replace_file(path, lambda draft: parquet.write_table(pa.table(columns), draft))
