"""The Python API for a trained run: `iwm_fast.load(folder)` returns a model with encoder, predictor and actions.

model = iwm_fast.load("runs/demo")                # a run or an export, also with checkpoint=1500 or size=64
tokens = model.encode("photo.jpg")                # (1, N, D): tokens of all patches
action = model.action(brightness=0.4)             # (1, A): 1.5 times as bright; docs/transformations.md has all
predicted = model.predict("photo.jpg", action)    # (1, N, D): predicted tokens of the changed image
target = model.encode_targets("changed.jpg")      # (1, N, D): actual tokens of a changed image
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.checkpoints.export import is_export, read_export, read_trained_encoder
from iwm_fast.checkpoints.reading import naming_file, require_networks_fit, with_positions
from iwm_fast.config.evaluation import READOUTS
from iwm_fast.config.loading import load_config, load_run_config
from iwm_fast.config.run import RunConfig
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.layers import NORM_EPS
from iwm_fast.models.student import build_student
from iwm_fast.pipelines.config import Normalization, require
from iwm_fast.pipelines.errors import UndecodableImageError
from iwm_fast.pipelines.sampling.masks import all_patches
from iwm_fast.pipelines.transforms.action import action_from_change
from iwm_fast.pipelines.transforms.geometry import crop_window
from iwm_fast.pipelines.transforms.image_decoding import decode_image, upright_rgb
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.pipelines.transforms.operations.crop import full_crop
from iwm_fast.pipelines.transforms.torch_renderer import resized_crop

# Margin over the range of normalised pixels, for images that somebody changed after normalisation.
_NORMALISED_MARGIN = 4.0

Images = str | Path | Image.Image | np.ndarray | Tensor | list[Any] | tuple[Any, ...]
"""Images for a model: the path of a file, a PIL image, a uint8 array (H, W, 3), a list of these, or a batch of
normalised images (B, 3, H, W) of the run's size, as `WorldModel.load_image` returns it."""


@dataclass(frozen=True, kw_only=True)
class WorldModel:
    """Encoder and predictor of a trained run, frozen and in float32."""

    config: RunConfig
    """Settings of the run."""
    encoder: Encoder
    """The EMA teacher, which is the encoder that evaluations use, unless the student was asked for."""
    predictor: nn.Module
    """The world model itself; the identity if the run has no predictor."""
    step: int
    """Optimiser steps of the checkpoint; 0 for an untrained model."""

    @property
    def device(self) -> torch.device:
        """Device of the weights; inputs are moved to it."""
        return next(self.encoder.parameters()).device

    def to(self, device: str | torch.device) -> "WorldModel":
        """Move the networks to a device, in place, and return this model."""
        self.encoder.to(device)
        self.predictor.to(device)
        return self

    def load_image(self, images: Images, *, max_pixels: int | None = None) -> Float[Tensor, "B 3 H W"]:
        """Prepare images: crop the largest centred square, resize it to the run's size and normalise it.

        A batch of normalised images is checked and moved to the model's device. Its values are checked only on the CPU,
        because a GPU would have to be waited for.

        Args:
            images: see `Images`.
            max_pixels: largest number of pixels of a file, which is checked before the file is decoded. None: the
                run's data.max_pixels.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if a file is not an image, truncated or too large, or a batch is not normalised or has another
                size.
            TypeError: for anything else.
        """
        size = self.config.views.size
        if isinstance(images, Tensor):
            return _require_normalised(images, size, self.config.data.normalization).to(self.device, torch.float32)
        crops = self.crop_images(images if isinstance(images, list | tuple) else [images], max_pixels)
        return normalize_view(crops, self.config.data.normalization).to(self.device)

    def crop_images(self, images: Sequence[Any], max_pixels: int | None = None) -> UInt8[Tensor, "B S S 3"]:
        """Read images, crop the largest centred squares and resize them to the run's size S.

        Args:
            images: paths, PIL images or uint8 arrays (H, W, 3).
            max_pixels: see `load_image`.

        Raises:
            FileNotFoundError, ValueError, TypeError: if an image cannot be used, as in `load_image`.
        """
        limit = max_pixels or self.config.data.max_pixels
        pixels = [_read_pixels(image, limit) for image in images]
        if not pixels:
            raise ValueError("images must not be an empty list")
        windows = crop_window(full_crop(len(pixels)), np.array([image.shape[:2] for image in pixels]))
        size = self.config.views.size
        return torch.stack([resized_crop(image, window, size) for image, window in zip(pixels, windows, strict=True)])

    def action(self, **change: float) -> Float[Tensor, "1 A"]:
        """Return the action of a change, given by name in natural units; entries that are not named mean no change.

        Brightness, for instance, is the logarithm of a factor: 0.4 makes an image 1.5 times as bright, and -0.4 undoes
        it. In runs with `views.jitter.encoding=difference` it is a difference of factors. Flags such as blur are 1 if
        the source has the effect and the target does not. docs/transformations.md lists all entries with their units.

        Raises:
            ValueError: for a name that is not an entry of the run's actions.
        """
        entries = self.config.views.entries
        for name in change:
            if name not in entries:
                raise ValueError(
                    f"action must name entries of this run's actions, which are {', '.join(entries)}, got {name!r}"
                )
        return torch.from_numpy(action_from_change(change, self.config.views)).to(self.device)

    @torch.no_grad()
    def encode(self, images: Images, *, layers: int = 1) -> Float[Tensor, "B N E"]:
        """Return the encoder's tokens of all patches of images; their mean over N is the image's feature.

        Args:
            images: see `Images`.
            layers: number of last layers whose outputs, each after the final norm, are concatenated to E = layers * D
                features, the last layer at the end.

        Raises:
            ValueError: if the encoder has fewer layers.
            FileNotFoundError, ValueError, TypeError: if the images cannot be used, as in `load_image`.
        """
        self.require_layers(layers)
        view = self.load_image(images)
        tokens = self.encoder(view, None) if layers == 1 else self.encoder.last_layers(view, layers)
        return tokens.unflatten(0, (len(view), -1))

    def predict(
        self, images: Images, action: Float[Tensor, "actions A"], *, readout: str = "absolute"
    ) -> Float[Tensor, "predictions N D"]:
        """Return the predicted tokens of the changed images at all positions; `encode_targets` returns the actual ones.

        There is one action per image, or one image or one action for all of the others.

        Args:
            images: see `Images`.
            action: as `action` returns it; several are concatenated.
            readout: "absolute" returns the prediction for the action, as in the paper. "difference" returns the effect
                of the action on the source: the prediction for the action, minus the prediction for no action, plus the
                source's own target tokens. What the predictor gets wrong whatever the action is cancels.

        Raises:
            ValueError: if the run's predictor is the identity, or `readout` is neither of these.
            FileNotFoundError, ValueError, TypeError: if the images cannot be used, as in `load_image`.
        """
        self.require_predictor()
        return self.predict_from(self.encode(images), action, readout=readout)

    @torch.no_grad()
    def predict_from(
        self, tokens: Float[Tensor, "images N D"], action: Float[Tensor, "actions A"], *, readout: str = "absolute"
    ) -> Float[Tensor, "predictions N D"]:
        """Return what `predict` returns, from the tokens that `encode` returned for the sources.

        Raises:
            ValueError: if the run's predictor is the identity, or `readout` is unknown.
        """
        self.require_predictor()
        num_predictions, num_patches = max(len(tokens), len(action)), tokens.shape[1]
        sources = tokens.expand(num_predictions, -1, -1).flatten(0, 1)
        # The image is visible and predicted at every position, so both indices are all patches.
        patches = all_patches(num_predictions, num_patches).to(self.device)
        predicted = self.predictor(sources, action.expand(num_predictions, -1).to(self.device), patches, patches)
        return predicted.unflatten(0, (num_predictions, num_patches)) + self.readout_offset(tokens, readout)

    @torch.no_grad()
    def readout_offset(self, tokens: Float[Tensor, "images N D"], readout: str) -> Float[Tensor, "images N D"]:
        """Return what a readout adds to any prediction from these tokens of sources: nothing if it is absolute.

        Otherwise it is the source's own target tokens minus the prediction for no action. It does not depend on the
        action, so it is computed once for many actions.

        Raises:
            ValueError: if `readout` is unknown.
        """
        require(readout in READOUTS, "readout", readout, f"be {' or '.join(READOUTS)}")
        if readout == "absolute":
            return torch.zeros_like(tokens)
        return _normalized(tokens) - self.predict_from(tokens, self.action())

    def encode_targets(self, images: Images) -> Float[Tensor, "B N D"]:
        """Return the tokens that the predictor was trained to predict: layer-normalised without parameters.

        Raises:
            FileNotFoundError, ValueError, TypeError: if the images cannot be used, as in `load_image`.
        """
        return _normalized(self.encode(images))

    def require_layers(self, layers: int) -> None:
        """Check that the encoder has so many layers.

        Raises:
            ValueError: if it has not.
        """
        depth = self.config.model.encoder.depth
        require(1 <= layers <= depth, "layers", layers,
                f"be between 1 and the {depth} layers of the run's encoder (model.encoder.depth)")  # fmt: skip

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


def _normalized(tokens: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
    return functional.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)


def _read_pixels(image: Any, max_pixels: int) -> UInt8[Tensor, "H W 3"]:
    """Return the pixels of a file, a PIL image or an array."""
    if isinstance(image, str | Path):
        encoded = np.frombuffer(Path(image).read_bytes(), np.uint8)
        try:
            return decode_image(encoded, max_pixels)
        except UndecodableImageError as error:
            raise ValueError(f"{image} must be a complete image of a supported format, but it {error}") from error
    if isinstance(image, Image.Image):
        return upright_rgb(image)
    if not isinstance(image, np.ndarray):
        raise TypeError(
            "images must be paths, PIL images, uint8 arrays (H, W, 3), a list of these, or a normalised tensor "
            f"(B, 3, H, W), got {type(image).__name__}"
        )
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            "an array must be one image of type uint8 and shape (H, W, 3), or be in a list of such arrays, got "
            f"{image.dtype} {image.shape}"
        )
    return torch.from_numpy(np.ascontiguousarray(image))


def _require_normalised(view: Tensor, size: int, normalization: Normalization) -> Float[Tensor, "B 3 H W"]:
    """Return a batch of normalised images if it is one."""
    expected = f"a tensor must hold normalised images, float (B, 3, {size}, {size}), as `model.load_image` returns them"
    if not view.is_floating_point() or view.ndim != 4 or view.shape[1:] != (3, size, size):
        raise ValueError(f"{expected}, got {str(view.dtype).removeprefix('torch.')} {tuple(view.shape)}")
    if view.device.type != "cpu" or not len(view):
        return view
    low, high = view.amin((0, 2, 3)), view.amax((0, 2, 3))
    black, white = ((np.array(value) - normalization.mean) / normalization.std for value in (0.0, 1.0))
    # Normalised pixels fill this range in all three channels only by an improbable coincidence, unless black is 0.
    is_zero_to_one = bool(((low >= 0) & (low < 0.1) & (high > 0.9) & (high <= 1)).all()) and black.min() < 0
    limit = _NORMALISED_MARGIN * max(-black.min(), white.max())
    if is_zero_to_one or max(high.max(), -low.min()) > limit:
        raise ValueError(f"{expected}; got values from {low.min():g} to {high.max():g}, which are not normalised")
    return view


def load(
    folder: str | Path,
    device: str | torch.device = "cpu",
    checkpoint: int | str | Path | None = None,
    *,
    size: int | None = None,
    encoder: str = "teacher",
) -> WorldModel:
    """Load a run, an export, or a single checkpoint.

    The model has the settings that the checkpoint was trained with, which may differ from those of the run's last phase
    (data.restart_epoch). Only paths, runtime and output are the run's.

    Args:
        folder: folder of a run, an export or a checkpoint.
        device: device to load it onto.
        checkpoint: which checkpoint of a run: a step, the path of its folder, or "best" for the one that
            `output.keep_best` kept; None or empty: the newest undamaged one.
        size: side of the images in pixels, a multiple of the patch size. Positions are recomputed for it. None: the
            size that the run was trained with.
        encoder: "teacher" loads the EMA teacher, "student" the encoder that was trained by gradient descent.

    Raises:
        FileNotFoundError: if the folder is none of these, or a run that has no checkpoint yet, or not the chosen one.
        ValueError: if another checkpoint of an export is chosen than its only one, patches do not divide `size`, or
            `encoder` is neither of these.
        CheckpointError: if the chosen checkpoint is damaged, or all of them are, or the export is, or if settings do
            not belong to the weights.
    """
    require(encoder in ("teacher", "student"), "encoder", encoder, "be teacher or student")
    folder = Path(folder)
    if is_export(folder):
        export = read_export(folder)
        if checkpoint not in (None, "", export.step, str(export.step)):
            raise ValueError(
                f"{str(folder)!r} is an export of step {export.step} and has no other, got checkpoint={checkpoint}; "
                "name the folder of the run"
            )
        encoder_state = export.encoder_state if encoder == "teacher" else read_trained_encoder(folder)
        states = encoder_state, export.predictor_state
        return _trained(export.config.at_size(size), *states, step=export.step, device=device)
    with naming_file(folder / checkpoints.CONFIG):
        run_config = load_run_config(folder)
    saved = checkpoints.read_chosen(folder, checkpoint)
    config = _trained_config(saved, run_config)
    encoder_state = saved.teacher_state if encoder == "teacher" else saved.student_state
    states = encoder_state, saved.weights("predictor.")
    require_networks_fit(config, *states, saved.folder / checkpoints.CONFIG)
    return _trained(config.at_size(size), *states, step=saved.step, device=device)


def _trained_config(saved: Checkpoint, run_config: RunConfig) -> RunConfig:
    """Return the settings that a checkpoint was trained with, and the paths, runtime and output of its run."""
    path = saved.folder / checkpoints.CONFIG
    with naming_file(path):
        trained = load_config(path)
    statistics = {"pixel_mean": trained.data.pixel_mean, "pixel_std": trained.data.pixel_std}
    data = replace(run_config.data, **statistics)
    return replace(trained, data=data, runtime=run_config.runtime, output=run_config.output)


def _trained(
    config: RunConfig,
    encoder_state: dict[str, Tensor],
    predictor_state: dict[str, Tensor],
    *,
    step: int,
    device: str | torch.device,
) -> WorldModel:
    # The trained weights replace those of an untrained model of the same sizes.
    model = build_untrained(config, device)
    model.encoder.load_state_dict(with_positions(encoder_state, config))
    model.predictor.load_state_dict(predictor_state)
    return replace(model, step=step)


def build_untrained(config: RunConfig, device: str | torch.device = "cpu") -> WorldModel:
    """Return a model with the initial weights of the run's settings and seed, the control of evaluations."""
    # The reference operations run on every device, whatever the run was trained with.
    student = build_student(config, REFERENCE).requires_grad_(False).eval().to(device)
    return WorldModel(config=config, encoder=student.encoder, predictor=student.predictor, step=0)
