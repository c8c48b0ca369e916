"""The Python API for a trained run: `iwm_fast.load(folder)` returns a model with encoder, predictor and actions.

model = iwm_fast.load("runs/demo")                              # a run, or an export
image = model.load_image("photo.jpg")                           # (1, 3, H, W), normalised
action = model.action(brightness=0.5, hue=0.1)                  # (1, A): 50 % brighter, a tenth of a turn of hue
predicted = model.predict(image, action)                        # (1, N, D): predicted tokens of the changed image
target = model.encode_targets(model.load_image("changed.jpg"))  # (1, N, D): actual tokens of a changed image
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
from iwm_fast.pipelines.sampling.masks import all_patches
from iwm_fast.pipelines.transforms.action import action_of
from iwm_fast.pipelines.transforms.geometry import crop_window
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.pipelines.transforms.parameters import identity_draws
from iwm_fast.pipelines.transforms.torch_renderer import UNDECODABLE, decode_image, resized_crop

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class WorldModel:
    """Encoder and predictor of a trained run, frozen and in float32."""

    config: RunConfig
    """Settings of the run."""
    encoder: Encoder
    """The EMA teacher, which is the encoder that evaluations use."""
    predictor: nn.Module
    """The world model itself; the identity if the run has no predictor."""
    step: int
    """Optimiser steps of the checkpoint; 0 for an untrained model."""
    device: torch.device
    """Device of the weights; inputs are moved to it."""

    def load_image(self, path: str | Path) -> Float[Tensor, "1 3 H W"]:
        """Read an image file, crop its largest centred square, resize it to the run's size and normalise it.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not an image, or truncated.
        """
        encoded = np.frombuffer(Path(path).read_bytes(), np.uint8)
        try:
            pixels = decode_image(encoded)
        except UNDECODABLE as error:
            raise ValueError(f"{path} must be a complete image of a supported format: {error}") from error
        window = crop_window(identity_draws(1).crop, np.array([pixels.shape[:2]]))
        return normalize_view(resized_crop(pixels, window[0], self.config.views.size)[None]).to(self.device)

    def action(self, **change: float) -> Float[Tensor, "1 A"]:
        """Return the action of a change, given by name in natural units; entries that are not named mean no change.

        Brightness, contrast and saturation are differences of factors, so 0.5 changes a factor of 1 to 1.5. Hue is a
        share of a full turn. Blur, grayscale and solarize are 1 if the source has the effect and the target does not.

        Raises:
            ValueError: for a name that is not an entry of the run's actions.
        """
        entries = self.config.views.entries
        for name in change:
            if name not in entries:
                raise ValueError(
                    f"action must name entries of this run's actions, which are {', '.join(entries)}, got {name!r}"
                )
        return torch.from_numpy(action_of(change, self.config.views)).to(self.device)

    @torch.no_grad()
    def encode(self, view: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Return the encoder's tokens of all patches of normalised images."""
        tokens = self.encoder(view.to(self.device), None)
        return tokens.unflatten(0, (len(view), -1))

    def predict(self, view: Float[Tensor, "B 3 H W"], action: Float[Tensor, "B A"]) -> Float[Tensor, "B N D"]:
        """Return the predicted tokens of the changed images at all positions; `encode_targets` returns the actual ones.

        Raises:
            ValueError: if the run's predictor is the identity.
        """
        return self.predict_from(self.encode(view), action)

    @torch.no_grad()
    def predict_from(self, tokens: Float[Tensor, "B N D"], action: Float[Tensor, "B A"]) -> Float[Tensor, "B N D"]:
        """Return the predicted tokens of changed images from the tokens that `encode` returned for the sources.

        Raises:
            ValueError: if the run's predictor is the identity.
        """
        self.require_predictor()
        num_images, num_patches, _ = tokens.shape
        # The image is visible and predicted at every position, so both indices are all patches.
        patches = all_patches(num_images, num_patches).to(self.device)
        predicted = self.predictor(tokens.flatten(0, 1), action.to(self.device), patches, patches)
        return predicted.unflatten(0, (num_images, num_patches))

    def encode_targets(self, view: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B N D"]:
        """Return the tokens that the predictor was trained to predict: layer-normalised without parameters."""
        tokens = self.encode(view)
        return functional.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)

    def require_predictor(self) -> None:
        """Check that the run has a predictor.

        Raises:
            ValueError: if the run was trained with the identity predictor.
        """
        if self.config.model.predictor.depth == 0:
            raise ValueError(
                "run must have a predictor, not the identity (model.predictor.depth=0); evaluate its encoder with knn, "
                "linear, attentive or finetune arms=encoder, or train with model.predictor.depth above 0"
            )


def load(folder: str | Path, device: str | torch.device = "cpu") -> WorldModel:
    """Load the newest complete checkpoint of a run, or an export folder.

    Raises:
        FileNotFoundError: if the folder is neither a run nor an export, or has no checkpoint yet.
        CheckpointError: if all checkpoints are damaged, or the export is.
    """
    folder = Path(folder)
    if is_export(folder):
        export = read_export(folder)
        states = export.encoder_state, export.predictor_state
        return _trained(export.config, *states, step=export.step, device=device)
    config = load_run_config(folder)
    saved, damaged = checkpoints.read_newest(folder)
    if saved is None:
        raise FileNotFoundError(f"{str(folder)!r} has no checkpoint yet; wait for output.checkpoint_every steps")
    for reason in damaged.values():
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
    # The trained weights replace those of an untrained model of the same sizes.
    model = untrained(config, device)
    model.encoder.load_state_dict(encoder_state)
    model.predictor.load_state_dict(predictor_state)
    return replace(model, step=step)


def untrained(config: RunConfig, device: str | torch.device = "cpu") -> WorldModel:
    """Return a model with the initial weights of the run's settings and seed, the control of evaluations."""
    # The reference operations run on every device, whatever the run was trained with.
    student = build_student(config, REFERENCE).requires_grad_(False).eval().to(device)
    return WorldModel(
        config=config, encoder=student.encoder, predictor=student.predictor, step=0, device=torch.device(device)
    )
