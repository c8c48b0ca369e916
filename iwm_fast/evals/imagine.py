"""The world model at work, as a picture: a change is asked for, its prediction is looked up in a bank of images."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.distributed import choose_device
from iwm_fast.evals.bank import distances, draw_bank, predicted_map, ranks, target_map
from iwm_fast.evals.config import ImagineConfig
from iwm_fast.evals.features import batches, spread, validation_shards
from iwm_fast.pictures import Panel, save_sheet
from iwm_fast.world_model import WorldModel
from pipelines.actions import describe_action
from pipelines.batch import denormalize_view

_LABELS = ("source", "asked for", "retrieved")


def imagine(config: ImagineConfig) -> Path:
    """Draw one column per image; the change is the bank's first member, so nothing is picked by hand."""
    model = world_model.load(config.run, choose_device(config.device))
    shards = validation_shards(model, config.data)
    columns = []
    for batch in batches(model, shards, spread(shards.num_samples, config.num_images)):
        for pixels, sample in zip(denormalize_view(batch.source_view), batch.sample.tolist(), strict=True):
            columns.append(_column(model, pixels, sample, config))
    path = Path(config.picture or Path(config.run) / "imagine.png")
    title = f"{config.bank_size} jittered versions of each image ({config.bank} strengths), step {model.step}"
    save_sheet(path, _LABELS, list(zip(*columns, strict=True)), title)
    return path


def _column(model: WorldModel, pixels: UInt8[Tensor, "H W 3"], sample: int, config: ImagineConfig) -> list[Panel]:
    bank = draw_bank(pixels, sample, config.bank_size, model=model, strengths=config.bank, seed=config.seed)
    distance = distances(predicted_map(model, pixels, bank), target_map(model, bank))
    nearest = int(distance[0].argmin())
    images: UInt8[np.ndarray, "M H W 3"] = bank.pixels.cpu().numpy()
    words = describe_action(bank.action[0].numpy(), model.config.views)
    return [
        Panel(pixels=pixels.cpu().numpy()),
        Panel(pixels=images[0], caption=words),
        Panel(pixels=images[nearest], caption=f"right answer at rank {float(ranks(distance)[0]):g}"),
    ]
