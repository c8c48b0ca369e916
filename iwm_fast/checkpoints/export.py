"""Exporting a trained run as a folder for others: weights as safetensors, a description of the networks, a model card.

    <folder>/
        encoder.safetensors           the EMA teacher, under timm's names
        trained_encoder.safetensors   the encoder trained by gradient descent, under timm's names
        predictor.safetensors         the world model; absent for the identity predictor
        config.json                   the call that builds the encoder in timm, settings, action entries, statistics
        README.md                     model card
        manifest.json                 size and SHA-256 of each file (see pipelines.storage.atomic)

The folder exists complete or not at all.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file, save_file
from torch import Tensor

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.checkpoints.errors import CheckpointError, require_undamaged
from iwm_fast.checkpoints.model_card import model_card
from iwm_fast.config.commands import ExportConfig
from iwm_fast.config.loading import build, load_config, to_tree
from iwm_fast.config.run import EncoderConfig, RunConfig
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines.config import ViewConfig
from iwm_fast.pipelines.storage.atomic import publish, save_json
from iwm_fast.pipelines.transforms.action import action_difference
from iwm_fast.pipelines.transforms.normalization import PIXEL_MEAN, PIXEL_STD

FORMAT = 1
ENCODER, TRAINED_ENCODER, PREDICTOR = "encoder.safetensors", "trained_encoder.safetensors", "predictor.safetensors"
DESCRIPTION, CARD = "config.json", "README.md"

# timm's name of each encoder size (dim, num_heads, depth), and the patch sizes for which timm has a model of that name.
_TIMM_SIZES = {
    (192, 3, 12): ("tiny", (16,)),
    (384, 6, 12): ("small", (8, 16, 32)),
    (768, 12, 12): ("base", (8, 16, 32)),
    (1024, 16, 24): ("large", (14, 16, 32)),
    (1280, 16, 32): ("huge", (14,)),
}
_TIMM_IMAGE_SIZE = 224
# Arguments with which timm's features are the mean over patches after the final norm.
_TIMM_HEADLESS = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}

# Groups of settings that build or explain the networks. The others, data, runtime and output, name paths and machines.
_EXPORTED_GROUPS = ("seed", "views", "mask", "model", "objective", "optim")


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """The networks of an export folder."""

    config: RunConfig
    """Settings that build the networks; data, runtime and output are defaults."""
    step: int
    """Number of optimiser steps of the checkpoint that was exported."""
    encoder_state: dict[str, Tensor]
    """The teacher's tensors under timm's names."""
    predictor_state: dict[str, Tensor]
    """The predictor's tensors; empty for the identity predictor."""


def export(config: ExportConfig) -> Path:
    """Export the newest undamaged checkpoint of a run and return the export folder.

    Raises:
        FileNotFoundError: if the run has no checkpoint.
        CheckpointError: if all checkpoints are damaged.
        FileExistsError: if the export folder exists.
    """
    saved, _ = checkpoints.read_newest(Path(config.run))
    if saved is None:
        raise FileNotFoundError(f"{config.run!r} has no checkpoint to export; give run=DIR of a training run")
    description = describe(saved, load_config(saved.folder / checkpoints.CONFIG))
    # Positions are fixed and therefore not among the trained weights, but timm expects them.
    trained = saved.weights("encoder.") | {"pos_embed": saved.teacher_state["pos_embed"]}
    card = model_card(description, read_evaluations(Path(config.run)), _last_metrics(Path(config.run), saved.step))
    writers = {
        ENCODER: lambda path: save_file(saved.teacher_state, path),
        TRAINED_ENCODER: lambda path: save_file(trained, path),
        PREDICTOR: lambda path: save_file(saved.weights("predictor."), path),
        DESCRIPTION: lambda path: save_json(description, path),
        CARD: lambda path: path.write_text(card, encoding="utf-8"),
    }
    if description["predictor"] is None:
        del writers[PREDICTOR]
    publish(Path(config.to), writers)
    return Path(config.to)


def describe(saved: Checkpoint, config: RunConfig) -> dict[str, Any]:
    """Return the content of an export's config.json."""
    tree = to_tree(config)
    weights = {"encoder": saved.weights("encoder."), "predictor": saved.weights("predictor.")}
    return {
        "format": FORMAT,
        "encoder": {"call": timm_call(config.model.encoder, config.views.size), "file": ENCODER},
        "predictor": {**tree["model"]["predictor"], "file": PREDICTOR} if config.model.predictor.depth else None,
        "action": describe_action_entries(config.views),
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
        "settings": {name: tree[name] for name in _EXPORTED_GROUPS},
        "data": {"num_samples": saved.counters["num_samples"], "content_digest": saved.fingerprint["data.train"]},
        "num_parameters": {name: sum(map(Tensor.numel, state.values())) for name, state in weights.items() if state},
        "step": saved.step,
        "versions": saved.versions,
    }


def timm_call(config: EncoderConfig, image_size: int) -> str:
    """Return the Python expression that builds this encoder in timm, by name if timm has a model of this size."""
    size, patch_sizes = _TIMM_SIZES.get((config.dim, config.num_heads, config.depth), ("", ()))
    if config.patch_size in patch_sizes and config.mlp_ratio == 4:
        arguments = {} if image_size == _TIMM_IMAGE_SIZE else {"img_size": image_size}
        name = f"vit_{size}_patch{config.patch_size}_{_TIMM_IMAGE_SIZE}"
        return f"timm.create_model({name!r}, {_format_arguments(arguments | _TIMM_HEADLESS)})"
    arguments = {
        "img_size": image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
    }
    return f"timm.models.vision_transformer.VisionTransformer({_format_arguments(arguments | _TIMM_HEADLESS)})"


def _format_arguments(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def describe_action_entries(views: ViewConfig) -> list[dict[str, Any]]:
    """Return the name of each entry of the action vector, in order, and the meaning of a value of 1."""
    ones = np.ones((1, len(views.entries)), np.float32)
    differences = action_difference(ones, views)
    return [{"name": name, "one_means": _describe_one(name, float(scale[0]))} for name, scale in differences.items()]


def _describe_one(name: str, scale: float) -> str:
    texts = {
        "hue": f"the target's hue is turned by {scale:g} of a full circle against the source's",
        "blur": "the source is blurred, the target is not",
        "grayscale": "the source has lost its colours, the target has not",
        "solarize": "the source is solarized, the target is not",
        "crop_x": f"the source's centre lies {scale:g} target widths to the right of the target's",
        "crop_y": f"the source's centre lies {scale:g} target heights below the target's",
        "crop_width": f"log(source width / target width) is {scale:g}",
        "crop_height": f"log(source height / target height) is {scale:g}",
        "flip": "the source is mirrored against the target",
    }
    return texts.get(name, f"the target's {name} factor is {scale:g} above the source's")


def read_evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """Return the evaluation results of a run, by file name without ending."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in run.glob("evaluations/*.json")}


def _last_metrics(run: Path, step: int) -> dict[str, Any]:
    """Return the last logged row of a run up to a step; empty if there is none."""
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    return rows[-1] if rows else {}


def is_export(folder: Path) -> bool:
    """Return whether a folder has the files of an export, without reading them."""
    return (folder / DESCRIPTION).is_file() and (folder / ENCODER).is_file()


def read_export(folder: Path) -> ExportedModel:
    """Read an export folder and check its files against the manifest.

    Raises:
        CheckpointError: if it is damaged or has another format.
    """
    try:
        require_undamaged(folder, (DESCRIPTION, ENCODER))
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if description["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {description['format']}, not {FORMAT}")
        if description["predictor"] is not None:
            require_undamaged(folder, (PREDICTOR,))
    # The note replaces the advice for checkpoints of a run, which does not help with an export.
    except CheckpointError as error:
        error.add_note("copy the export folder again, or export the run again with this version of iwm-fast")
        raise
    return ExportedModel(
        config=build(RunConfig, description["settings"]),
        step=description["step"],
        encoder_state=load_file(folder / ENCODER),
        predictor_state={} if description["predictor"] is None else load_file(folder / PREDICTOR),
    )
