"""How far a transformation moves the encoder's features, as a share of how far apart different images are.

A clean image is changed several times. The mean squared distance of the changed images' features to the clean one's is
divided by that of two clean images. An invariant encoder has 0; at 1, a changed image is as far away as another image.
Measured for the tokens, patch by patch, and for their mean over all patches, which probes use. The paper tells
invariant and equivariant models apart by MRR, which depends on the predictor as well; this measure is ours.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Int64, UInt8
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.config.evaluation import SensitivityConfig
from iwm_fast.evals.datasets import clean_images, compute_sharded, evenly_spaced, require_readable, validation_shards
from iwm_fast.evals.results import Result, mean_row, name_with_choices, save_result
from iwm_fast.evals.retrieval.bank import chosen_families, draw_bank, render_bank, source_parameters
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.runtime.distributed import RankInfo, broadcast_from_rank_zero, single_process
from iwm_fast.runtime.error_reporting import same_error_on_all_ranks
from iwm_fast.world_model import WorldModel

_KINDS = ("tokens", "pooled")


def evaluate_sensitivity(config: SensitivityConfig, rank_info: RankInfo | None = None) -> Result:
    """Measure the relative distances beside those of the untrained encoder, and save `sensitivity_<bank>`.

    The interval is over images and takes the distance of two images as known. Collective: every rank must call it.

    Raises:
        FileNotFoundError, CheckpointError, ShardError: if the run or its shards cannot be used.
        ValueError: if a family is off in the run.
    """
    rank_info = rank_info or single_process(config.device)
    with same_error_on_all_ranks():
        model = world_model.load(config.run, rank_info.device, checkpoint=config.checkpoint, size=config.size)
        families = chosen_families(config.families, model.config.views)
        shards = validation_shards(model, config.data)
    samples = evenly_spaced(shards.num_samples, config.num_images)
    broadcast_from_rank_zero(lambda: require_readable((shards, samples)))
    control = world_model.build_untrained(replace(model.config, seed=config.seed), model.device)
    models = [model, control]

    def measure_share(local: Int64[np.ndarray, "share"]) -> Iterator[Float[Tensor, "models distances 2"]]:
        return measure_images(models, families, shards, _with_partners(local, samples), config)

    shape = len(models), len(families) + 1, len(_KINDS)
    distances = compute_sharded(samples, measure_share, shape, "images changed", rank_info).cpu().numpy()
    return broadcast_from_rank_zero(lambda: _report(distances, families, model, config))


def _with_partners(
    local: Int64[np.ndarray, "share"], samples: Int64[np.ndarray, "images"]
) -> Int64[np.ndarray, "two_share"]:
    """Return each sample followed by the one half of all samples further on, to which its distance is measured."""
    partners = samples[(np.searchsorted(samples, local) + len(samples) // 2) % len(samples)]
    return np.stack([local, partners], axis=1).ravel()


@torch.no_grad()
def measure_images(
    models: list[WorldModel],
    families: tuple[str, ...],
    shards: ShardSet,
    pairs: Int64[np.ndarray, "two_images"],
    config: SensitivityConfig,
) -> Iterator[Float[Tensor, "models distances 2"]]:
    """Yield for each first image of a pair its distances to its changed versions by family, last that to the second.

    Distances are mean squared differences of tokens and of pooled features.
    """
    images = clean_images(models[0], shards, pairs)
    for (pixels, sample), (other, _) in zip(images, images, strict=True):
        changed = [_changed_versions(family, pixels, sample, models[0], config) for family in families]
        yield torch.stack([
            torch.stack([_distances(model, pixels, versions) for versions in [*changed, other[None]]])
            for model in models
        ])  # fmt: skip


def _changed_versions(
    family: str, pixels: UInt8[Tensor, "H W 3"], sample: int, model: WorldModel, config: SensitivityConfig
) -> UInt8[Tensor, "M H W 3"]:
    """Return an image changed as in banks, or destroyed as their sources are."""
    views = model.config.views
    if getattr(views, family).family == "inverse":
        return render_bank(pixels, source_parameters(family, views), model).pixels
    strengths = {"model": model, "strengths": config.bank, "seed": config.seed, "family": family}
    return draw_bank(pixels, sample, config.bank_size, **strengths).pixels


def _distances(
    model: WorldModel, pixels: UInt8[Tensor, "H W 3"], versions: UInt8[Tensor, "M H W 3"]
) -> Float[Tensor, "2"]:
    """Return the mean squared differences of the features of an image and of its versions: of tokens, and pooled."""
    views = torch.cat([pixels[None].to(versions.device), versions])
    tokens = model.encode(normalize_view(views, model.config.data.normalization)).double()
    features = (tokens, tokens.mean(dim=1))
    return torch.stack([(values[1:] - values[:1]).square().mean() for values in features]).float()


def _report(
    distances: Float32[np.ndarray, "images models distances 2"],
    families: tuple[str, ...],
    model: WorldModel,
    config: SensitivityConfig,
) -> Result:
    relative = distances[:, :, :-1] / distances[:, :, -1:].mean(axis=0)
    rows = [
        mean_row(
            family, f"relative_distance_{kind}", relative[:, 0, index, column], config.seed,
            control=relative[:, 1, index, column], control_name="untrained encoder",
        )
        for index, family in enumerate(families)
        for column, kind in enumerate(_KINDS)
    ]  # fmt: skip
    result = Result(
        task="sensitivity", name=name_with_choices(f"sensitivity_{config.bank}", config, model.step),
        rows=tuple(rows), step=model.step, seed=config.seed, settings=asdict(config),
    )  # fmt: skip
    save_result(config.run, result)
    return result
