"""Mean reciprocal rank (MRR) of the correct image when a predicted change is looked up in a bank of changed images.

The predictor gets a source image and the action that leads to one candidate of the image's bank. All candidates are
ranked by the squared distance of their tokens to the prediction, and each candidate is the correct answer once.

Transformations of both views are predicted from the clean image. Those of the source view only are predicted from the
destroyed image with their flag set: no predictor learns the way from a clean to a destroyed image. Ties get their mean
rank, so a predictor that ignores the action scores close to chance instead of 0. Source: IWM; the
directions of the families are ours. So is the second readout: besides the prediction itself (the paper's protocol), the
effect of the action on the source's own tokens is looked up, as `WorldModel.predict` explains. Its metrics have names
of their own.

Images are processed one at a time and leave only their ranks, so memory grows with the bank (two token maps per
candidate) but not with the number of images. With several ranks, each processes its share of the images.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float32, Int64, UInt8
from pyarrow import parquet
from torch import Tensor

from iwm_fast.config.evaluation import READOUTS, MrrConfig, Readout
from iwm_fast.evals.datasets import clean_images, compute_sharded, evenly_spaced, require_readable, validation_shards
from iwm_fast.evals.results import Result, Row, mean_row, name_with_choices, save_result
from iwm_fast.evals.retrieval.bank import (
    CandidateBank,
    Query,
    bank_family,
    bank_views,
    chosen_families,
    diagonal_ranks,
    draw_bank,
    encode_bank,
    make_query,
    metric_name,
    open_world_model,
    query_distances,
    with_untrained_predictor,
)
from iwm_fast.pipelines.errors import to_valid_unicode
from iwm_fast.pipelines.storage.atomic import replace_file
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, rank_zero_only, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)

Ranks = Float32[np.ndarray, "models readouts images families M"]
"""Ranks of the correct answers, from 1, of the run's model and its control."""


def evaluate_mrr(config: MrrConfig, rank_info: RankInfo | None = None) -> Result:
    """Measure MRR and recall beside chance and an untrained predictor on the same encoder, and save `mrr_<bank>`.

    The ranks of all queries are saved in `mrr_<bank>_ranks.parquet`. Transformations that training did not
    apply, or whose flag is missing from the run's actions, are measured with a warning. Collective: every rank must
    call it.

    Raises:
        FileNotFoundError, CheckpointError, ShardError: if the run or its shards cannot be used.
        ValueError: if the run's predictor is the identity, or a family is off in the run.
    """
    rank_info = rank_info or single_process(config.device)
    with same_error_on_all_ranks():
        model = open_world_model(config.run, rank_info.device, config.checkpoint, config.size)
        families = chosen_families(config.families, model.config.views)
        shards = validation_shards(model, config.data)
    samples = evenly_spaced(shards.num_samples, config.num_images)
    broadcast_from_rank_zero(lambda: require_readable((shards, samples)))
    models = [model, with_untrained_predictor(model, config.seed)]
    shape = len(models) * len(READOUTS), len(families), config.bank_size

    def rank_share(local: Int64[np.ndarray, "share"]) -> Iterator[Tensor]:
        return map(torch.from_numpy, rank_images(models, shards, local, config, READOUTS))

    values = compute_sharded(samples, rank_share, shape, "images ranked", rank_info).cpu().numpy()
    ranks = values.reshape(len(samples), len(models), len(READOUTS), *values.shape[2:]).transpose(1, 2, 0, 3, 4)
    result = _make_result(ranks, model, config)
    keys = [to_valid_unicode(shards.key(int(sample))) for sample in samples]
    rank_zero_only(lambda: _save(result, keys, ranks))
    return result


def rank_images(
    models: list[WorldModel],
    shards: ShardSet,
    samples: Int64[np.ndarray, "images"],
    config: MrrConfig,
    readouts: Sequence[Readout] = ("absolute",),
) -> Iterator[Float32[np.ndarray, "predictions families M"]]:
    """Yield for each image the ranks of the correct answers, in the same bank for all models.

    The first axis has all readouts of the first model, then those of the next. The models must share their encoder;
    only the predictors are compared. Not collective.
    """
    views = models[0].config.views
    families = chosen_families(config.families, views)
    for pixels, sample in clean_images(models[0], shards, samples):
        ranks: dict[str, Float32[np.ndarray, "predictions M"]] = {}
        for name in dict.fromkeys(bank_family(family, views) for family in families):
            bank = draw_bank(pixels, sample, config.bank_size, model=models[0], strengths=config.bank,
                             seed=config.seed, family=name)  # fmt: skip
            sharing = [family for family in families if bank_family(family, views) == name]
            by_family = ranks_in_bank(models, pixels, bank, sharing, readouts).swapaxes(0, 1)
            ranks |= zip(sharing, by_family, strict=True)
        yield np.stack([ranks[family] for family in families], axis=1)


def ranks_in_bank(
    models: list[WorldModel],
    pixels: UInt8[Tensor, "H W 3"],
    bank: CandidateBank,
    families: Sequence[str],
    readouts: Sequence[Readout] = ("absolute",),
) -> Float32[np.ndarray, "predictions families M"]:
    """Return the ranks of the correct answers in the bank of one clean image, as `rank_images` does."""
    target = encode_bank(models[0], bank)
    queries = [make_query(pixels, bank, family, models[0]) for family in families]

    def ranks(model: WorldModel, query: Query) -> Float32[np.ndarray, "readouts M"]:
        return np.stack([diagonal_ranks(distance) for distance in query_distances(model, query, target, readouts)])

    return np.concatenate([np.stack([ranks(model, query) for query in queries], axis=1) for model in models])


def chance_mrr(bank_size: int) -> float:
    """Return the expected reciprocal rank in a random order, the harmonic number of the bank's size over that size."""
    return float((1 / np.arange(1, bank_size + 1)).mean())


def mean_reciprocal_rank(rank: Float32[np.ndarray, "images *rest M"]) -> float:
    """Return the mean reciprocal rank."""
    # The queries of an image are averaged first, in the order in which `mean_row` averages, so that both agree.
    return float((1 / rank.astype(np.float64)).mean(axis=-1).mean())


def _make_result(ranks: Ranks, model: WorldModel, config: MrrConfig) -> Result:
    rows: list[Row] = []
    families = chosen_families(config.families, model.config.views)
    for index, family in enumerate(families):
        for number, readout in enumerate(READOUTS):
            rows += _family_rows(family, readout, ranks[:, number, :, index], config.seed)
    views = model.config.views
    drawn = bank_views(views, config.bank)
    banks = dict.fromkeys(bank_family(family, views) for family in families)
    inverse = [item for item in views.operations if item.name in families and item.family == "inverse"]
    destroyed = [item.query_source(1) for item in inverse]
    name = name_with_choices(f"mrr_{config.bank}", config, model.step)
    details = {
        "families": list(families),
        "bank_strengths": {entry.name: entry.strength for name in banks for entry in getattr(drawn, name).entries},
        # Parameters of the destroyed sources that are not flags.
        **{name: float(value[0]) for item in destroyed for name, value in item.items() if value.dtype != bool},
        **_unsupported_families(families, views),
        "ranks": f"{name}_ranks.parquet",
    }
    return Result(
        task="mrr", name=name, rows=tuple(rows), step=model.step, seed=config.seed,
        settings=asdict(config), details=details,
    )  # fmt: skip


def _family_rows(family: str, readout: Readout, ranks: Float32[np.ndarray, "models images M"], seed: int) -> list[Row]:
    rank, control_rank = ranks.astype(np.float64)
    size = rank.shape[1]
    metrics = {
        "mrr": (lambda rank: 1 / rank, chance_mrr(size)),
        "recall_at_1": (lambda rank: rank <= 1, 1 / size),
        "recall_at_5": (lambda rank: rank <= 5, min(1.0, 5 / size)),
    }
    return [
        # The interval is over images, because the queries of one bank are not independent.
        mean_row(family, metric_name(metric, readout), score(rank).mean(axis=1), seed,
                 control=score(control_rank), control_name="untrained predictor", chance=chance)
        for metric, (score, chance) in metrics.items()
    ]  # fmt: skip


def _unsupported_families(families: Sequence[str], views: ViewConfig) -> dict[str, list[str]]:
    """Return and log the families that the run cannot be expected to handle."""
    flags = [item for item in views.operations if item.name in families and item.family == "inverse"]
    not_encoded = [item.name for item in flags if not {entry.name for entry in item.entries} & set(views.entries)]
    not_trained = [item.name for item in flags if not item.is_trained]
    reasons = ((not_encoded, "which the run's actions do not encode"), (not_trained, "which training did not apply"))
    for names, reason in reasons:
        if names:
            log.warning("families contains %s, %s", " and ".join(names), reason)
    return {"not_in_action": not_encoded, "not_in_training": not_trained}


def _save(result: Result, keys: list[str], ranks: Ranks) -> None:
    """Write the result and, beside it, a table with one row per image, family and candidate."""
    num_families, size = ranks.shape[-2:]
    columns = {
        "key": np.repeat(keys, num_families * size),
        "family": np.tile(np.repeat(result.details["families"], size), len(keys)),
        "member": np.tile(np.arange(size, dtype=np.int32), len(keys) * num_families),
    }
    for number, readout in enumerate(READOUTS):
        for name, values in zip(("rank", "rank_untrained"), ranks[:, number], strict=True):
            columns[metric_name(name, readout)] = values.ravel()
    path = save_result(result.settings["run"], result).with_name(result.details["ranks"])
    replace_file(path, lambda draft: parquet.write_table(pa.table(columns), draft))
