"""A trained run as a user takes it: `load(folder)` gives encoder, predictor and action space.

world_model = iwm_fast.world_model.load("runs/demo")
tokens = world_model.encode(view)                        # (B, N, D) what is there
imagined = world_model.predict(tokens, action)           # (B, N, D) what would be there after the change
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from iwm_fast import checkpoint as checkpoints
from iwm_fast.config import RunConfig
from iwm_fast.export import is_export, read_export
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.layers import NORM_EPS
from iwm_fast.models.student import build_student
from iwm_fast.settings import load_config
from kernels.ops import REFERENCE
from pipelines.masks import all_patches

log = logging.getLogger("iwm_fast")


@dataclass(frozen=True, kw_only=True)
class WorldModel:
    """The teacher's encoder and the predictor, frozen, in float32."""

    config: RunConfig
    encoder: Encoder
    """The EMA teacher: what is evaluated and exported."""
    predictor: nn.Module
    step: int
    """Optimiser steps of the checkpoint; 0 for an untrained model."""
    device: torch.device

    @torch.no_grad()
    def encode(self, view: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Return the tokens of all patches of normalised images."""
        tokens = self.encoder(view.to(self.device), None)
        return tokens.unflatten(0, (len(view), -1))

    @torch.no_grad()
    def predict(self, tokens: Float[Tensor, "B N D"], action: Float[Tensor, "B A"]) -> Float[Tensor, "B N D"]:
        """Return the predicted tokens of the changed images at all positions, comparable with `targets`."""
        num_images, num_patches, _ = tokens.shape
        everything = all_patches(num_images, num_patches).to(self.device)
        predicted = self.predictor(tokens.flatten(0, 1), action.to(self.device), everything, everything)
        return predicted.unflatten(0, (num_images, num_patches))

    def targets(self, view: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Return what the predictor was trained to predict: tokens, LayerNormed without parameters."""
        tokens = self.encode(view)
        return functional.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)


def load(folder: str | Path, device: str | torch.device = "cpu") -> WorldModel:
    """Load a run's newest whole checkpoint, or an export folder.

    Raises:
        FileNotFoundError: if the folder holds neither, or no checkpoint yet.
        CheckpointError: if no checkpoint is whole, or the export is damaged.
    """
    folder = Path(folder)
    if is_export(folder):
        found = read_export(folder)
        return _trained(found.config, found.encoder_state, found.predictor_state, step=found.step, device=device)
    if not (folder / "config.yaml").is_file():
        raise FileNotFoundError(
            f"{str(folder)!r} is no run folder: it has no config.yaml; give run=DIR of a training run or an export"
        )
    saved, refused = checkpoints.read_newest(folder)
    if saved is None:
        raise FileNotFoundError(f"{str(folder)!r} has no checkpoint yet; wait for output.checkpoint_every steps")
    for reason in refused.values():
        log.warning("%s; loading step %d instead", reason, saved.step)
    config, predictor_state = load_config(folder / "config.yaml"), saved.weights("predictor.")
    return _trained(config, saved.teacher_state, predictor_state, step=saved.step, device=device)


def _trained(
    config: RunConfig,
    encoder_state: dict[str, Tensor],
    predictor_state: dict[str, Tensor],
    *,
    step: int,
    device: str | torch.device,
) -> WorldModel:
    model = untrained(config, device)
    model.encoder.load_state_dict(encoder_state)
    model.predictor.load_state_dict(predictor_state)
    return replace(model, step=step)


def untrained(config: RunConfig, device: str | torch.device = "cpu") -> WorldModel:
    """Return a model as the run's settings and seed initialise it: the control of every evaluation."""
    student = build_student(config, REFERENCE).requires_grad_(False).eval().to(device)
    return WorldModel(
        config=config, encoder=student.encoder, predictor=student.predictor, step=0, device=torch.device(device)
    )
