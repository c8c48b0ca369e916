"""Exporting a trained run as a folder for others: weights as safetensors, a description of the networks, a model card.

    <folder>/
        model.safetensors             the EMA teacher, under timm's names
        config.json                   timm's description of the teacher: architecture, arguments, preprocessing
        iwm.json                      everything else: settings, action entries, statistics, versions
        trained_encoder.safetensors   the encoder trained by gradient descent, under timm's names
        predictor.safetensors         the world model; absent for the identity predictor
        pixel_decoder.safetensors     from tokens to pixels; only if `iwm decode` has trained it for this checkpoint
        README.md                     model card
        manifest.json                 size and SHA-256 of each file (see pipelines.storage.atomic)

The first two files have the names and the content that timm and the Hugging Face Hub expect, so that
`timm.create_model("local-dir:FOLDER", pretrained=True)` builds the teacher. The folder exists complete or not at all.

In format 1 the teacher was `encoder.safetensors` and the description `config.json`. Such folders can still be read.
"""

import json
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.checkpoint import Checkpoint
from iwm_fast.checkpoints.errors import CheckpointError, require_undamaged
from iwm_fast.checkpoints.model_card import model_card
from iwm_fast.checkpoints.pixel_decoder import DECODERS, EXPORTED_DECODER, find_pixel_decoder, read_spec
from iwm_fast.checkpoints.reading import naming_file, read_json, read_tensors, require_networks_fit, with_positions
from iwm_fast.config.commands import ExportConfig
from iwm_fast.config.loading import build, config_to_dict, load_config
from iwm_fast.config.run import EncoderConfig, RunConfig
from iwm_fast.monitoring.metrics import read_metrics
from iwm_fast.pipelines.config import IMAGENET, Normalization, require
from iwm_fast.pipelines.storage.atomic import write_folder, write_json
from iwm_fast.pipelines.transforms.composition import ViewConfig, upgraded_views

log = logging.getLogger(__name__)

FORMAT = 2
ENCODER, TRAINED_ENCODER, PREDICTOR = "model.safetensors", "trained_encoder.safetensors", "predictor.safetensors"
TIMM_CONFIG, DESCRIPTION, CARD = "config.json", "iwm.json", "README.md"
# Description and teacher of each format.
_FILES = {1: ("config.json", "encoder.safetensors"), FORMAT: (DESCRIPTION, ENCODER)}

# timm's name of each encoder size (dim, num_heads, depth), and the patch sizes for which timm has a model of that name.
_TIMM_SIZES = {
    (192, 3, 12): ("tiny", (16,)),
    (384, 6, 12): ("small", (8, 16, 32)),
    (768, 12, 12): ("base", (8, 16, 32)),
    (1024, 16, 24): ("large", (14, 16, 32)),
    (1280, 16, 32): ("huge", (14,)),
}
# Architecture for sizes without a name in timm. All of its arguments are overridden.
_TIMM_ANY_SIZE = "vit_base_patch16_224"
# Arguments with which timm's features are the mean over patches after the final norm.
_TIMM_HEADLESS = {"class_token": False, "global_pool": "avg", "fc_norm": False}

# Groups of settings that build or explain the networks. The others, data, runtime and output, name paths and machines.
_EXPORTED_GROUPS = ("seed", "views", "mask", "model", "objective", "optim")

# The settings of data that an export carries, with the values of exports that lack them.
_NORMALIZATION = {f"pixel_{name}": value for name, value in IMAGENET._asdict().items()}


@dataclass(frozen=True, kw_only=True)
class ExportedModel:
    """The networks of an export folder."""

    config: RunConfig
    """Settings that build the networks; runtime, output and data, but for the pixels' statistics, are defaults."""
    step: int
    """Number of optimiser steps of the checkpoint that was exported."""
    encoder_state: dict[str, Tensor]
    """The teacher's tensors under timm's names."""
    predictor_state: dict[str, Tensor]
    """The predictor's tensors; empty for the identity predictor."""


def export(config: ExportConfig) -> Path:
    """Export a checkpoint of a run, by default the newest undamaged one, and return the export folder.

    Raises:
        FileNotFoundError: if the run has no checkpoint, or not the chosen one.
        CheckpointError: if the chosen checkpoint is damaged, or all of them are.
        FileExistsError: if the export folder exists.
        ValueError: if patches do not divide `size`.
    """
    saved = checkpoints.read_chosen(Path(config.run), config.checkpoint)
    config_path = saved.folder / checkpoints.CONFIG
    with naming_file(config_path):
        run_config = load_config(config_path)
    require_networks_fit(run_config, saved.teacher_state, saved.weights("predictor."), config_path)
    run_config = run_config.at_size(config.size)
    teacher = with_positions(saved.teacher_state, run_config)
    decoder = _find_decoder(Path(config.run), saved.step, run_config.grid)
    description = describe(saved, run_config, decoder)
    student = saved.student_state | {"pos_embed": teacher["pos_embed"]}
    timm_description = timm_config(run_config.model.encoder, run_config.views.size, run_config.data.normalization)
    card = model_card(description, read_evaluations(Path(config.run)), _last_metrics(Path(config.run), saved.step))
    writers = {
        # Some libraries refuse safetensors files that do not name their framework.
        ENCODER: lambda path: save_file(teacher, path, metadata={"format": "pt"}),
        TRAINED_ENCODER: lambda path: save_file(student, path, metadata={"format": "pt"}),
        PREDICTOR: lambda path: save_file(saved.weights("predictor."), path, metadata={"format": "pt"}),
        TIMM_CONFIG: lambda path: write_json(timm_description, path),
        DESCRIPTION: lambda path: write_json(description, path),
        CARD: lambda path: path.write_text(card, encoding="utf-8"),
    }
    if description["predictor"] is None:
        del writers[PREDICTOR]
    if decoder is not None:
        writers[EXPORTED_DECODER] = lambda path: shutil.copyfile(decoder, path)
    write_folder(Path(config.to), writers)
    return Path(config.to)


def _find_decoder(run: Path, step: int, grid: int) -> Path | None:
    """Return the file of a checkpoint's pixel decoder, or None if there is none of this checkpoint and grid."""
    try:
        path = find_pixel_decoder(run, step)
        if read_spec(path).grid == grid:
            return path
        log.warning("the export has no pixel decoder: %s decodes images of the run's size only", path)
    except FileNotFoundError as missing:
        if (run / DECODERS).is_dir():
            log.warning("the export has no pixel decoder: %s, and export again", missing)
    return None


def describe(saved: Checkpoint, config: RunConfig, decoder: Path | None = None) -> dict[str, Any]:
    """Return the content of an export's iwm.json; `decoder` is the file of the pixel decoder, if there is one."""
    tree = config_to_dict(config)
    weights = {"encoder": saved.weights("encoder."), "predictor": saved.weights("predictor.")}
    decoder_sizes = None if decoder is None else {**config_to_dict(read_spec(decoder)), "file": EXPORTED_DECODER}
    return {
        "format": FORMAT,
        "encoder": {**tree["model"]["encoder"], "file": ENCODER},
        "predictor": {**tree["model"]["predictor"], "file": PREDICTOR} if config.model.predictor.depth else None,
        "pixel_decoder": decoder_sizes,
        "action": describe_action_entries(config.views),
        "pixel_mean": config.data.pixel_mean,
        "pixel_std": config.data.pixel_std,
        "settings": {name: tree[name] for name in _EXPORTED_GROUPS},
        "trained_size": saved.fingerprint["views.size"],
        "data": {"num_samples": saved.counters["num_samples"], "content_digest": saved.fingerprint["data.train"]},
        "num_parameters": {name: sum(map(Tensor.numel, state.values())) for name, state in weights.items() if state},
        "step": saved.step,
        "versions": saved.versions,
    }


def timm_config(config: EncoderConfig, image_size: int, normalization: Normalization) -> dict[str, Any]:
    """Return the content of config.json, with which timm builds the teacher and preprocesses its images."""
    name, patch_sizes = _TIMM_SIZES.get((config.dim, config.num_heads, config.depth), ("", ()))
    is_named = config.patch_size in patch_sizes
    return {
        "architecture": f"vit_{name}_patch{config.patch_size}_224" if is_named else _TIMM_ANY_SIZE,
        "num_classes": 0,
        "num_features": config.dim,
        "global_pool": "avg",
        "model_args": {
            "img_size": image_size,
            "patch_size": config.patch_size,
            "embed_dim": config.dim,
            "depth": config.depth,
            "num_heads": config.num_heads,
            "mlp_ratio": config.mlp_ratio,
            **_TIMM_HEADLESS,
        },
        "pretrained_cfg": {
            "tag": "iwm",
            "custom_load": False,
            "num_classes": 0,
            "input_size": [3, image_size, image_size],
            "fixed_input_size": True,
            # An image is its largest centred square, resized, as `WorldModel.load_image` prepares it.
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": normalization.mean,
            "std": normalization.std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def describe_action_entries(views: ViewConfig) -> list[dict[str, Any]]:
    """Return the name of each entry of the action vector, in order, and the meaning of a value of 1."""
    entries = views.all_entries
    return [{"name": name, "one_means": entries[name].one_means} for name in views.entries]


def read_evaluations(run: Path) -> dict[str, dict[str, Any]]:
    """Return the evaluation results of a run, by file name without ending."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in run.glob("evaluations/*.json")}


def _last_metrics(run: Path, step: int) -> dict[str, Any]:
    """Return the last logged row of a run up to a step; empty if there is none."""
    rows = [row for row in read_metrics(run) if row["step"] <= step]
    return rows[-1] if rows else {}


def is_export(folder: Path) -> bool:
    """Return whether a folder is an export, without reading its files."""
    # In format 1, the description has a name that other folders use as well.
    return (folder / DESCRIPTION).exists() or all((folder / name).is_file() for name in _FILES[1])


def read_export(folder: Path) -> ExportedModel:
    """Read an export folder and check its files against the manifest.

    Raises:
        CheckpointError: if it is damaged, has another format, or its settings do not belong to its weights.
    """
    # In format 1, config.json was the description. Now it is timm's.
    description_file, encoder_file = _FILES[FORMAT if (folder / DESCRIPTION).exists() else 1]
    try:
        require_undamaged(folder, (description_file, encoder_file))
        description = read_json(folder / description_file, ("format",))
        if description["format"] not in tuple(_FILES):
            raise CheckpointError(f"{folder} has format {description['format']!r}, not 1 to {FORMAT}")
        return _read_networks(folder, folder / description_file, folder / encoder_file)
    # The note replaces the advice for checkpoints of a run, which does not help with an export.
    except CheckpointError as error:
        error.add_note("copy the export folder again, or export the run again with this version of iwm-fast")
        raise


def read_trained_encoder(folder: Path) -> dict[str, Tensor]:
    """Read the encoder of an export folder that was trained by gradient descent, under timm's names.

    Raises:
        CheckpointError: if the folder does not have it, or it is damaged.
    """
    try:
        require_undamaged(folder, (TRAINED_ENCODER,))
        return read_tensors(folder / TRAINED_ENCODER)
    except CheckpointError as error:
        error.add_note(f"{folder} has no usable student; use the teacher, or export the run again")
        raise


def _read_networks(folder: Path, description_path: Path, encoder_path: Path) -> ExportedModel:
    description = read_json(description_path, ("predictor", "settings", "step"))
    with naming_file(description_path):
        require(isinstance(description["step"], int), "step", description["step"], "be an integer")
        # The folder has no other settings of data: they name paths.
        data = {name: description.get(name, default) for name, default in _NORMALIZATION.items()}
        settings = description["settings"]
        config = build(RunConfig, {**settings, "views": upgraded_views(settings["views"]), "data": data})
    encoder_state, predictor_state = read_tensors(encoder_path), {}
    if description["predictor"] is not None:
        require_undamaged(folder, (PREDICTOR,))
        predictor_state = read_tensors(folder / PREDICTOR)
    require_networks_fit(config, encoder_state, predictor_state, description_path)
    return ExportedModel(
        config=config, step=description["step"], encoder_state=encoder_state, predictor_state=predictor_state
    )
