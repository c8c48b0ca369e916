"""Roll-outs: several actions applied one after the other to tokens, compared with one action that does the same.

Each jittered version of a clean image is asked for by n equal actions, whose sum is the action that leads to it. The
first one is applied to the encoder's tokens of the clean image, each further one to the tokens that were predicted
before. The sum is exact for both encodings of actions: a difference is divided into equal differences, a logarithm of
a ratio into those of equal factors. So one target serves all n, and only the predictions differ.

The paper applies its world model once. This evaluation is ours.
"""

from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from iwm_fast.config.evaluation import READOUTS, RolloutConfig
from iwm_fast.evals.datasets import clean_images, compute_sharded, evenly_spaced, require_readable, validation_shards
from iwm_fast.evals.results import Result, Row, mean_row, name_with_choices, save_result
from iwm_fast.evals.retrieval.bank import (
    bank_family,
    diagonal_ranks,
    draw_bank,
    encode_bank,
    make_query,
    mean_squared_distances,
    metric_name,
    open_world_model,
    with_untrained_predictor,
)
from iwm_fast.evals.retrieval.imagined import find_decoder
from iwm_fast.evals.retrieval.mrr import chance_mrr
from iwm_fast.evals.retrieval.repeated_actions import roll_out
from iwm_fast.evals.retrieval.rollout_strips import save_strips
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, rank_zero_only, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.world_model import WorldModel

_METRICS = ("distance", "mrr")


def evaluate_rollout(config: RolloutConfig, rank_info: RankInfo | None = None) -> Result:
    """Measure predictions after 1 to `max_actions` actions, and save `rollout_<bank>`, with strips if they are decoded.

    Metrics are the distance to the target's tokens and the mean reciprocal rank among all targets of the image, beside
    an untrained predictor and the distance of the unchanged source. Collective: every rank must call it.

    Raises:
        FileNotFoundError, CheckpointError, ShardError: if the run or its shards cannot be used.
        ValueError: if the run's predictor is the identity.
    """
    rank_info = rank_info or single_process(config.device)
    with same_error_on_all_ranks():
        model = open_world_model(config.run, rank_info.device, config.checkpoint, config.size)
        shards = validation_shards(model, config.data)
    samples = evenly_spaced(shards.num_samples, config.num_images)
    broadcast_from_rank_zero(lambda: require_readable((shards, samples)))
    models = [model, with_untrained_predictor(model, config.seed)]
    shape = len(models), len(READOUTS), config.max_actions + 1, len(_METRICS)

    def measure_share(local: Int64[np.ndarray, "share"]) -> Iterator[Float[Tensor, "models readouts lengths 2"]]:
        return measure_images(models, shards, local, config)

    measured = compute_sharded(samples, measure_share, shape, "images rolled out", rank_info).cpu().numpy()
    result = Result(
        task="rollout", name=name_with_choices(f"rollout_{config.bank}", config, model.step),
        rows=tuple(_rows(measured, config)), step=model.step, seed=config.seed, settings=asdict(config),
    )  # fmt: skip
    rank_zero_only(lambda: _save(result, model, shards, config))
    return result


def _save(result: Result, model: WorldModel, shards: ShardSet, config: RolloutConfig) -> None:
    path = save_result(config.run, result)
    decoder = find_decoder(config.run, model)
    if decoder is not None:
        save_strips(path.with_suffix(".png"), model, decoder, shards, config)


@torch.no_grad()
def measure_images(
    models: list[WorldModel], shards: ShardSet, samples: Int64[np.ndarray, "images"], config: RolloutConfig
) -> Iterator[Float[Tensor, "models readouts lengths 2"]]:
    """Yield for each image the mean distance and the mean reciprocal rank after 0, 1, ... `max_actions` actions.

    After no action they are those of the source's own target tokens. The models must share their encoder.
    """
    model = models[0]
    for pixels, sample in clean_images(model, shards, samples):
        bank = draw_bank(pixels, sample, config.bank_size, model=model, strengths=config.bank, seed=config.seed)
        target = encode_bank(model, bank)
        query = make_query(pixels, bank, bank_family("", model.config.views), model)
        source = normalize_view(query.source[None], model.config.data.normalization)
        tokens = model.encode(source)
        unchanged = _score(model.encode_targets(source).expand(len(bank), -1, -1), target)
        yield torch.stack([
            torch.stack([
                torch.stack([unchanged] + [
                    _score(roll_out(network, tokens, query.action, count, readout=readout), target)
                    for count in range(1, config.max_actions + 1)
                ])
                for readout in READOUTS
            ])
            for network in models
        ])  # fmt: skip


def _score(predicted: Float[Tensor, "M N D"], target: Float[Tensor, "M ND"]) -> Float[Tensor, "2"]:
    """Return the mean distance of M predictions to their targets, and their mean reciprocal rank."""
    distance = mean_squared_distances(predicted.flatten(1), target)
    reciprocal_rank = (1 / diagonal_ranks(distance)).mean()
    return torch.stack([distance.diagonal().mean(), distance.new_tensor(reciprocal_rank)])


def _rows(measured: Float32[np.ndarray, "images models readouts lengths 2"], config: RolloutConfig) -> Iterator[Row]:
    yield mean_row("no change", "distance", measured[:, 0, 0, 0, 0], config.seed)
    for count in range(1, config.max_actions + 1):
        for number, readout in enumerate(READOUTS):
            for column, metric in enumerate(_METRICS):
                values, control = measured[:, :, number, count, column].T
                yield mean_row(
                    "1 action" if count == 1 else f"{count} actions", metric_name(metric, readout), values, config.seed,
                    control=control, control_name="untrained predictor",
                    chance=chance_mrr(config.bank_size) if metric == "mrr" else None,
                )  # fmt: skip
