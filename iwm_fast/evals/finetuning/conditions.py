"""What networks are given in finetuning besides the image: the predictor's action, and which patches are visible.

By default the complete image is visible, and the predictor predicts it without any change. `tune.action` and
`tune.context` bring either closer to pretraining, in training only.

Source: IWM, the ablation of the finetuning task. The paper's details are not known, so these definitions are ours.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from iwm_fast.config.finetuning import TuneConfig
from iwm_fast.config.run import RunConfig
from iwm_fast.pipelines.batch import Batch, RaggedIndex
from iwm_fast.pipelines.sampling.masks import draw_masks, ragged_index
from iwm_fast.pipelines.transforms.action import action_vector
from iwm_fast.pipelines.transforms.composition import draw
from iwm_fast.pipelines.transforms.geometry import source_geometry, source_window


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Action and visible patches of a micro-batch."""

    action: Float[Tensor, "B A"]
    """Change that the predictor is told."""
    context: RaggedIndex | None
    """Visible patches; None: all."""


def null_conditions(batch: Batch) -> Conditions:
    """Return the conditions of validation: no change, and all patches are visible."""
    return Conditions(action=torch.zeros_like(batch.action), context=None)


def training_conditions(batch: Batch, tune: TuneConfig, config: RunConfig) -> Conditions:
    """Return the conditions that the settings ask for in training.

    What is drawn depends on seed, step and slot alone.
    """
    conditions = null_conditions(batch)
    return Conditions(
        action=_draw_action(batch, config) if tune.action == "drawn" else conditions.action,
        context=_draw_context(batch, config) if tune.context == "masked" else conditions.context,
    )


def _draw_action(batch: Batch, config: RunConfig) -> Float[Tensor, "B A"]:
    """Return an action for each image from the distribution of pretraining; it does not depend on the pixels."""
    draws = draw(config.views, config.seed, batch.step, batch.slot.numpy())
    window = batch.crop_window.numpy()
    geometry = source_geometry(draws, window, source_window(draws.source_crop, window))
    action = action_vector(draws.source, draws.target, config.views, geometry)
    return torch.from_numpy(action).to(batch.action.device, non_blocking=True)


def _draw_context(batch: Batch, config: RunConfig) -> RaggedIndex:
    """Return the context patches of masks as in pretraining."""
    context = draw_masks(config.mask, config.grid, config.seed, batch.step, batch.slot.numpy()).context
    return ragged_index(context, int(context.sum())).to(batch.action.device)
