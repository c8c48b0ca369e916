"""Strips of decoded roll-outs: equal parts of a change, predicted one by one and at once, beside their rendering."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from iwm_fast.config.evaluation import READOUTS, RolloutConfig
from iwm_fast.evals.datasets import clean_images
from iwm_fast.evals.retrieval.bank import bank_family, draw_bank, encode_bank, make_query, render_bank
from iwm_fast.evals.retrieval.choice import choose_shown
from iwm_fast.evals.retrieval.imagined import decode_pixels
from iwm_fast.evals.retrieval.repeated_actions import iterate_actions
from iwm_fast.models.pixel_decoder import PixelDecoder
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.action import change_from_action, describe_action
from iwm_fast.pipelines.transforms.composition import identity_parameters
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.rendering.image_grid import ImageGrid, Panel, save_image_grids
from iwm_fast.world_model import WorldModel

_NUM_SHOWN = 3


def save_strips(path: Path, model: WorldModel, decoder: PixelDecoder, shards: ShardSet, config: RolloutConfig) -> None:
    """Draw the strips of a few colourful images, each for the first version of its bank, as a PNG file."""
    samples = choose_shown(model, shards, _NUM_SHOWN)
    strips = [
        draw_strip(pixels, sample, model, decoder, config) for pixels, sample in clean_images(model, shards, samples)
    ]
    title = f"{path.stem}, step {model.step}: a change in {config.max_actions} equal parts, decoded"
    save_image_grids(path, strips, title, panel_inches=1.35)


@torch.no_grad()
def draw_strip(
    pixels: UInt8[Tensor, "H W 3"], number: int, model: WorldModel, decoder: PixelDecoder, config: RolloutConfig
) -> ImageGrid:
    """Return the strip of an image, whose bank is seeded by `number`; column k shows k of the parts.

    Rows are the rendering, and for each readout the prediction of one action that covers all parts so far, and of one
    action per part.
    """
    views, count = model.config.views, config.max_actions
    bank = draw_bank(pixels, number, 1, model=model, strengths=config.bank, seed=config.seed)
    action = make_query(pixels, bank, bank_family("", views), model).action
    share = torch.arange(count + 1)[:, None] / count
    neutral = identity_parameters(views, count + 1)
    parameters, change = dict(neutral), change_from_action((share * action).numpy(), views)
    for operation in views.operations:
        parameters |= operation.target(neutral, change)
    rendered = render_bank(pixels, parameters, model)
    targets = encode_bank(model, rendered)
    source = normalize_view(rendered.pixels[:1], model.config.data.normalization)
    tokens, start = model.encode(source), model.encode_targets(source)
    rows = {"rendered": rendered.pixels.cpu().numpy()}
    distances: dict[str, np.ndarray] = {}
    for readout in READOUTS:
        at_once = torch.cat([start, model.predict_from(tokens, (share * action)[1:], readout=readout)])
        step_by_step = torch.cat([start, *iterate_actions(model, tokens, action / count, count, readout=readout)])
        for label, predicted in (("in one action", at_once), ("an action per part", step_by_step)):
            name = f"{label}, {readout}"
            rows[name] = decode_pixels(decoder, predicted.flatten(1))
            distances[name] = (predicted.flatten(1) - targets).square().mean(dim=1).cpu().numpy()
    distances["rendered"] = (start.flatten(1) - targets).square().mean(dim=1).cpu().numpy()
    return ImageGrid(
        title=describe_action(action[0].numpy(), views).capitalize(),
        labels=tuple(rows),
        rows=tuple(
            tuple(Panel(pixels=image, caption=_caption(name, part, count, float(distances[name][part])))
                  for part, image in enumerate(images))
            for name, images in rows.items()
        ),
    )  # fmt: skip


def _caption(row: str, part: int, count: int, distance: float) -> str:
    """Return the part of the change above the distance of the unchanged source, or the distance of the prediction."""
    if row != "rendered":
        return f"distance {distance:.3f}" if part else "the source's own tokens"
    return f"{part}/{count}; no change {distance:.3f}" if part else "source"
