"""A trained run as a user takes it: `iwm_fast.load(folder)` gives encoder, predictor and action space.

model = iwm_fast.load("runs/demo")                           # a run, or an export
image = model.load_image("photo.jpg")                              # (1, 3, H, W), normalised
action = model.action(brightness=0.5, hue=0.1)               # (1, A): half as bright again, a tenth of a turn
imagined = model.predict(image, action)                      # (1, N, D): the tokens of the changed image
there = model.encode_targets(model.load_image("brighter.jpg"))            # (1, N, D): what they are compared with
"""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.export import is_export, read_export
from iwm_fast.config.loading import load_run_config
from iwm_fast.config.run import RunConfig
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.layers import NORM_EPS
from iwm_fast.models.student import build_student
from iwm_fast.pipelines.config import check
from iwm_fast.pipelines.sampling.masks import all_patches
from iwm_fast.pipelines.transforms.action import action_of
from iwm_fast.pipelines.transforms.geometry import crop_window
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.pipelines.transforms.parameters import identity_draws
from iwm_fast.pipelines.transforms.torch_renderer import UNDECODABLE, decode_image, resized_crop

log = logging.getLogger(__name__)


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

    def load_image(self, path: str | Path) -> Float[Tensor, "1 3 H W"]:
        """Read an image file as the networks see it: its largest centred square at the run's size, normalised.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no image.
        """
        encoded = np.frombuffer(Path(path).read_bytes(), np.uint8)
        try:
            pixels = decode_image(encoded)
        except UNDECODABLE as error:
            raise ValueError(f"{path} must be a whole image of a known format: {error}") from error
        window = crop_window(identity_draws(1).crop, np.array([pixels.shape[:2]]))
        return normalize_view(resized_crop(pixels, window[0], self.config.views.size)[None]).to(self.device)

    def action(self, **change: float) -> Float[Tensor, "1 A"]:
        """Return what asks for a change, by name and in natural units; what is not named does not change.

        Brightness, contrast and saturation are differences of factors (0.5: from 1 to 1.5), hue is a share of a full
        turn; blur, grayscale and solarize are 1 if the source has it and the target not.

        Raises:
            ValueError: for a name that the run's actions do not have.
        """
        entries = self.config.views.entries
        for name in change:
            check(
                name in entries, "action", name, f"name entries of this run's actions, which are {', '.join(entries)}"
            )
        return torch.from_numpy(action_of(change, self.config.views)).to(self.device)

    @torch.no_grad()
    def encode(self, view: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Return the tokens of all patches of normalised images."""
        tokens = self.encoder(view.to(self.device), None)
        return tokens.unflatten(0, (len(view), -1))

    def predict(self, view: Float[Tensor, "B 3 H W"], action: Float[Tensor, "B A"]) -> Float[Tensor, "B N D"]:
        """Return the predicted tokens of the changed images at all positions, comparable with `targets`.

        Raises:
            ValueError: if the run has no predictor.
        """
        return self.predict_from(self.encode(view), action)

    @torch.no_grad()
    def predict_from(self, tokens: Float[Tensor, "B N D"], action: Float[Tensor, "B A"]) -> Float[Tensor, "B N D"]:
        """Do the same for images that are encoded already.

        Raises:
            ValueError: if the run has no predictor.
        """
        self.require_predictor()
        num_images, num_patches, _ = tokens.shape
        everything = all_patches(num_images, num_patches).to(self.device)
        predicted = self.predictor(tokens.flatten(0, 1), action.to(self.device), everything, everything)
        return predicted.unflatten(0, (num_images, num_patches))

    def encode_targets(self, view: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Return what the predictor was trained to predict: tokens, LayerNormed without parameters."""
        tokens = self.encode(view)
        return functional.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)

    def require_predictor(self) -> None:
        """Check that there is a world model.

        Raises:
            ValueError: if the run was trained with the identity predictor.
        """
        depth = self.config.model.predictor.depth
        check(depth > 0, "run", f"model.predictor.depth={depth}",
              "have a predictor, not the identity (the invariant end of the slider); evaluate its encoder with knn, "
              "linear, attentive or finetune arms=encoder, or train with model.predictor.depth above 0")  # fmt: skip


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
    config = load_run_config(folder)
    saved, refused = checkpoints.read_newest(folder)
    if saved is None:
        raise FileNotFoundError(f"{str(folder)!r} has no checkpoint yet; wait for output.checkpoint_every steps")
    for reason in refused.values():
        log.warning("%s; loading step %d instead", reason, saved.step)
    return _trained(config, saved.teacher_state, saved.weights("predictor."), step=saved.step, device=device)


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
