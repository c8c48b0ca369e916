"""Mean reciprocal rank of the predicted change among jittered versions of the image.

The untouched image and the action of one bank member go in; bank members are ranked by squared distance of token maps
to the prediction. Only jitter is asked for: training never shows the way from clean to destroyed. Ties share their
middle rank, so a predictor that ignores the action scores near chance, never 0. Source: paper section 4.
"""

from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from iwm_fast import world_model
from iwm_fast.distributed import choose_device
from iwm_fast.evals.bank import bank_views, distances, draw_bank, predicted_map, ranks, target_map
from iwm_fast.evals.config import MrrConfig
from iwm_fast.evals.features import batches, save_result, spread, validation_shards
from iwm_fast.world_model import WorldModel
from pipelines.batch import denormalize_view
from pipelines.shards import ShardSet


def evaluate_mrr(config: MrrConfig) -> dict[str, Any]:
    """Score a run beside chance and beside an untrained predictor on the same trained encoder; write the result."""
    model = world_model.load(config.run, choose_device(config.device))
    shards = validation_shards(model, config.data)
    control = replace(
        model, predictor=world_model.untrained(replace(model.config, seed=config.seed), model.device).predictor
    )
    rank, control_rank = bank_ranks([model, control], shards, config)
    reciprocal = 1 / rank
    strengths = bank_views(model.config.views, config.bank)
    result = {
        "mrr": float(reciprocal.mean()),
        # banks differ by image, members of one bank are not independent
        "mrr_standard_error": float(reciprocal.mean(axis=1).std(ddof=1) / np.sqrt(len(rank))) if len(rank) > 1 else 0.0,
        "mrr_chance": chance(config.bank_size),
        "mrr_untrained": float((1 / control_rank).mean()),
        "recall_at_1": float((rank <= 1).mean()),
        "recall_at_5": float((rank <= 5).mean()),
        "num_images": len(rank),
        "bank_strengths": {name: getattr(strengths, name) for name in ("brightness", "contrast", "saturation", "hue")},
        "step": model.step,
        "settings": asdict(config),
    }
    save_result(config.run, f"mrr_{config.bank}", result)
    return result


def bank_ranks(models: list[WorldModel], shards: ShardSet, config: MrrConfig) -> list[np.ndarray]:
    """Return for each model the (images, bank) ranks of the right answers, in the same banks.

    The models share their encoder: it is the predictors that are compared.
    """
    samples = spread(shards.num_samples, config.num_images)
    rows: list[list[np.ndarray]] = [[] for _ in models]
    for batch in batches(models[0], shards, samples):
        for pixels, sample in zip(denormalize_view(batch.source_view), batch.sample.tolist(), strict=True):
            bank = draw_bank(pixels, sample, config.bank_size, model=models[0], strengths=config.bank, seed=config.seed)
            target = target_map(models[0], bank)
            for row, model in zip(rows, models, strict=True):
                row.append(ranks(distances(predicted_map(model, pixels, bank), target)).cpu().numpy())
    return [np.stack(row) for row in rows]


def chance(bank_size: int) -> float:
    """Return the expected reciprocal rank of a random order: the harmonic number over the bank's size."""
    return float((1 / torch.arange(1, bank_size + 1, dtype=torch.float64)).mean())
