"""A trained run as a folder that others can use: weights as safetensors, what builds them again, a model card.

    <folder>/
        encoder.safetensors           the EMA teacher, under timm's names
        trained_encoder.safetensors   the encoder that was trained, likewise
        predictor.safetensors         the world model; not there for the identity predictor
        config.json                   timm's call, settings of the networks, the action's entries, pixel statistics
        README.md                     model card
        manifest.json                 size and SHA-256 of each (see pipelines.storage.atomic)

It is there whole or not at all.
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

# (dim, depth, heads) of timm's names, and the patch sizes that it has them for
_TIMM_SIZES = {
    (192, 3, 12): ("tiny", (16,)),
    (384, 6, 12): ("small", (8, 16, 32)),
    (768, 12, 12): ("base", (8, 16, 32)),
    (1024, 16, 24): ("large", (14, 16, 32)),
    (1280, 16, 32): ("huge", (14,)),
}
_TIMM_IMAGE_SIZE = 224
# features are the mean over patches after the final norm
_TIMM_HEADLESS = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}

# what of a run's settings makes and explains the networks; data, runtime and output hold paths and machines
_KEPT_SETTINGS = ("seed", "views", "mask", "model", "objective", "optim")


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export folder holds."""

    config: RunConfig
    """Settings that made the networks; data, runtime and output are defaults."""
    step: int
    """Optimiser steps of the checkpoint that was exported."""
    encoder_state: dict[str, Tensor]
    """The teacher's tensors under timm's names."""
    predictor_state: dict[str, Tensor]
    """The predictor's, none for the identity predictor."""


def export(config: ExportConfig) -> Path:
    """Write the newest whole checkpoint of a run as an export folder and return that.

    Raises:
        FileNotFoundError: if the run has no checkpoint.
        CheckpointError: if none is whole.
        FileExistsError: if the folder exists.
    """
    saved, _ = checkpoints.read_newest(Path(config.run))
    if saved is None:
        raise FileNotFoundError(f"{config.run!r} has no checkpoint to export; give run=DIR of a training run")
    described = describe(saved, load_config(saved.folder / checkpoints.CONFIG))
    # the teacher has the positions, which are fixed and so not among the trained weights
    trained = saved.weights("encoder.") | {"pos_embed": saved.teacher_state["pos_embed"]}
    card = model_card(described, read_evaluations(Path(config.run)), _last_row(Path(config.run), saved.step))
    writers = {
        ENCODER: lambda path: save_file(saved.teacher_state, path),
        TRAINED_ENCODER: lambda path: save_file(trained, path),
        PREDICTOR: lambda path: save_file(saved.weights("predictor."), path),
        DESCRIPTION: lambda path: save_json(described, path),
        CARD: lambda path: path.write_text(card, encoding="utf-8"),
    }
    if described["predictor"] is None:
        del writers[PREDICTOR]
    publish(Path(config.to), writers)
    return Path(config.to)


def describe(saved: Checkpoint, config: RunConfig) -> dict[str, Any]:
    """Return the content of config.json."""
    tree = to_tree(config)
    counts = {"encoder": saved.weights("encoder."), "predictor": saved.weights("predictor.")}
    return {
        "format": FORMAT,
        "encoder": {"call": timm_call(config.model.encoder, config.views.size), "file": ENCODER},
        "predictor": {**tree["model"]["predictor"], "file": PREDICTOR} if config.model.predictor.depth else None,
        "action": describe_entries(config.views),
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
        "settings": {name: tree[name] for name in _KEPT_SETTINGS},
        "data": {"num_samples": saved.counters["num_samples"], "content_digest": saved.fingerprint["data.train"]},
        "num_parameters": {name: sum(map(Tensor.numel, part.values())) for name, part in counts.items() if part},
        "step": saved.step,
        "versions": saved.versions,
    }


def timm_call(config: EncoderConfig, image_size: int) -> str:
    """Return the Python expression that makes this encoder in timm: by name where timm has one for the size."""
    size, patch_sizes = _TIMM_SIZES.get((config.dim, config.num_heads, config.depth), ("", ()))
    if config.patch_size in patch_sizes and config.mlp_ratio == 4:
        arguments = {} if image_size == _TIMM_IMAGE_SIZE else {"img_size": image_size}
        name = f"vit_{size}_patch{config.patch_size}_{_TIMM_IMAGE_SIZE}"
        return f"timm.create_model({name!r}, {_written_out(arguments | _TIMM_HEADLESS)})"
    arguments = {
        "img_size": image_size,
        "patch_size": config.patch_size,
        "embed_dim": config.dim,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "mlp_ratio": config.mlp_ratio,
    }
    return f"timm.models.vision_transformer.VisionTransformer({_written_out(arguments | _TIMM_HEADLESS)})"


def _written_out(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


def describe_entries(views: ViewConfig) -> list[dict[str, Any]]:
    """Return the action's entries in their order: name, and what a value of 1 stands for."""
    one = action_difference(np.ones((1, len(views.entries)), np.float32), views)
    return [{"name": name, "one_means": _one_means(name, float(scale[0]))} for name, scale in one.items()]


def _one_means(name: str, scale: float) -> str:
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
    """Return the results in a run's evaluations/, by name of the file."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in run.glob("evaluations/*.json")}


def _last_row(run: Path, step: int) -> dict[str, Any]:
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    return rows[-1] if rows else {}


def is_export(folder: Path) -> bool:
    """Return whether a folder is an export, as far as the names of its files tell."""
    return (folder / DESCRIPTION).is_file() and (folder / ENCODER).is_file()


def read_export(folder: Path) -> Exported:
    """Read an export folder after comparing it with its manifest.

    Raises:
        CheckpointError: if it is damaged or of another format.
    """
    try:
        require_undamaged(folder, (DESCRIPTION, ENCODER))
        described = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        if described["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {described['format']}, not {FORMAT}")
        if described["predictor"] is not None:
            require_undamaged(folder, (PREDICTOR,))
    except CheckpointError as error:
        error.add_note("copy the export folder again, or export the run again with this version of iwm-fast")
        raise
    return Exported(
        config=build(RunConfig, described["settings"]),
        step=described["step"],
        encoder_state=load_file(folder / ENCODER),
        predictor_state={} if described["predictor"] is None else load_file(folder / PREDICTOR),
    )
