"""`init_from`: the weights that a run starts with, instead of randomly initialised ones.

There are three kinds of source: the folder of a run (its newest checkpoint) or of a checkpoint, an export folder, or a
file of ViT weights under timm's names, as timm, I-JEPA and most other projects write them. The encoder takes the
source's teacher if it has one, and the run's own teacher starts as a copy of the encoder. No weights are ignored
silently: a block that is missing, unexpected or of another shape is an error that names it.
"""

import logging
import re
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.export import is_export, read_export
from iwm_fast.checkpoints.reading import naming_file
from iwm_fast.config.loading import load_config
from iwm_fast.config.run import RunConfig
from iwm_fast.models.layers import sincos_positions
from iwm_fast.models.student import Student
from iwm_fast.pipelines.storage.foreign_files import NUM_BYTES, recognise_text
from iwm_fast.runtime import distributed

log = logging.getLogger(__name__)

# Entries under which files store a model's weights. A file may have several; the teacher's come first, because the
# teacher is the network that is evaluated.
_ENTRIES = ("target_encoder", "teacher", "encoder", "model", "state_dict")
# Prefixes that wrappers such as DistributedDataParallel add to parameter names.
_PREFIXES = ("module.", "backbone.", "target_encoder.", "teacher.", "encoder.", "model.")
# Parameters that other ViTs have outside their blocks, and this encoder does not have.
_DROPPED = ("cls_token", "mask_token", "head.", "head_dist.")
_POSITIONS = "pos_embed"


@dataclass(frozen=True, kw_only=True)
class PretrainedWeights:
    """The weights that a run starts with."""

    encoder: dict[str, Tensor]
    """The encoder's weights under timm's names, without positions."""
    predictor: dict[str, Tensor]
    """The predictor's weights under our names; empty if the predictor keeps its random initialisation."""
    remarks: tuple[str, ...]
    """What a user should know about the weights, one sentence each."""


def is_fresh_start(config: RunConfig) -> bool:
    """Return whether rank 0 finds no checkpoint to resume from. Collective: every rank must call it."""
    return distributed.broadcast_from_rank_zero(
        lambda: checkpoints.find_newest_folder(Path(config.output.folder)) is None
    )


def initialize_from(config: RunConfig, student: Student) -> None:
    """Overwrite a student's weights in place with those that `init_from` names, if it names any.

    A run that resumes is left alone: its weights come from its own checkpoint, and the source may no longer exist.
    Collective: every rank must call it.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if it holds no weights that fit, naming the first that does not.
        CheckpointError: if a folder's files are damaged.
    """
    if not config.init_from or not is_fresh_start(config):
        return
    source = read_pretrained_weights(config, student)
    # The encoder keeps its own positions, which follow from its grid.
    student.encoder.load_state_dict(source.encoder | {_POSITIONS: student.encoder.pos_embed})
    if source.predictor:
        student.predictor.load_state_dict(source.predictor)
    for remark in source.remarks:
        log.info("init_from: %s", remark)


def read_pretrained_weights(config: RunConfig, student: Student) -> PretrainedWeights:
    """Read the weights that `init_from` names and check that they fit a student, which may be on the meta device.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if it holds no weights that fit, naming the first that does not.
        CheckpointError: if a folder's files are damaged.
    """
    path = Path(config.init_from)
    if path.is_file():
        weights, positions, origin = _read_file(path)
        remark = f"the encoder starts with {origin} of {path}"
        remarks = (remark, *_compare_positions(positions, student, path))
        source = PretrainedWeights(encoder=weights, predictor={}, remarks=remarks)
    elif path.is_dir():
        source = _read_folder(path, config, student)
    else:
        raise FileNotFoundError(
            f"init_from = {config.init_from!r} does not exist; name a run's folder, an export folder, or a file of "
            "weights (.safetensors, .pth, .pt, .tar)"
        )
    _require_fit(source.encoder, student.encoder, path)
    return source


def _require_fit(weights: dict[str, Tensor], module: nn.Module, path: Path) -> None:
    """Check that weights have exactly the names and shapes of a module's parameters."""
    expected = dict(module.named_parameters())
    for name, parameter in expected.items():
        if name not in weights:
            examples = ", ".join(list(weights)[:3])
            raise ValueError(f"init_from: {path} has no {name}, which this encoder needs; it has {examples} ...")
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"init_from: {name} of {path} has shape {tuple(weights[name].shape)}, but this run needs "
                f"{tuple(parameter.shape)}; set model.encoder to the values of the file's encoder"
            )
    unexpected = [name for name in weights if name not in expected]
    if unexpected:
        raise ValueError(
            f"init_from: {path} has {unexpected[0]}, which this encoder does not have: it has another architecture or "
            "depth; set model.encoder to the values of the file's encoder"
        )


def _read_folder(path: Path, config: RunConfig, student: Student) -> PretrainedWeights:
    """Read the weights of a run or an export, both of which store the settings of their networks."""
    if is_export(path):
        exported = read_export(path)
        source_config, encoder, predictor = exported.config, exported.encoder_state, exported.predictor_state
        step = exported.step
    else:
        if not checkpoints.is_checkpoint(path) and not checkpoints.list_checkpoint_folders(path):
            raise FileNotFoundError(
                f"init_from = {str(path)!r} holds neither an export nor a run with a checkpoint; name one that does"
            )
        saved = checkpoints.read_chosen(path)
        with naming_file(saved.folder / checkpoints.CONFIG):
            source_config = load_config(saved.folder / checkpoints.CONFIG)
        encoder, predictor, step = saved.teacher_state, saved.weights("predictor."), saved.step
    _require_same_encoder(source_config, config, path)
    # Positions follow from the grid. Without them, the weights also fit views of another size.
    encoder = {name: value for name, value in encoder.items() if name != _POSITIONS}
    mismatch = _predictor_mismatch(source_config, config, predictor, student)
    remarks = (f"the encoder starts with the teacher of {path}, step {step}",)
    if source_config.data.normalization != config.data.normalization:
        mean, std = source_config.data.normalization
        text = f"its images were normalised with data.pixel_mean={list(mean)} data.pixel_std={list(std)}"
        remarks = (*remarks, f"{text}: features differ until training has adapted")
    if config.model.predictor.depth > 0:
        initialised_by = f"its random initialisation, because {mismatch}" if mismatch else "the source's predictor"
        remarks = (*remarks, f"the predictor starts with {initialised_by}")
    return PretrainedWeights(encoder=encoder, predictor={} if mismatch else predictor, remarks=remarks)


def _require_same_encoder(source: RunConfig, current: RunConfig, path: Path) -> None:
    # Comparing shapes is not enough: with another number of heads, weights would fit but compute something else.
    if source.model.encoder != current.model.encoder:
        rows = _list_differences(asdict(source.model.encoder), asdict(current.model.encoder))
        raise ValueError(
            f"init_from: {path} has another encoder (source -> this run: {rows}); set model.encoder to match"
        )


def _predictor_mismatch(
    source: RunConfig, current: RunConfig, weights: dict[str, Tensor], student: Student
) -> str | None:
    """Return why this run cannot use the predictor of the source, None if it can.

    Raises:
        ValueError: if the predictors have equal settings, but their action entries differ.
    """
    if source.model.predictor != current.model.predictor:
        rows = _list_differences(asdict(source.model.predictor), asdict(current.model.predictor))
        return f"its settings differ (source -> this run: {rows})"
    is_conditioned = current.model.predictor.conditioning != "none"
    # Other entries may still be of the same number, and the predictor would read each as a different change.
    if is_conditioned and source.views.entries != current.views.entries:
        raise ValueError(
            f"init_from: the predictor of {current.init_from} was trained with the action entries "
            f"{source.views.entries}, but this run has {current.views.entries}; set views to the source's values, or "
            "use the encoder only: export the run, and name the export's model.safetensors"
        )
    _require_fit(weights, student.predictor, Path(current.init_from))
    return None


def _list_differences(source: dict[str, Any], current: dict[str, Any]) -> str:
    return ", ".join(f"{name} {source[name]} -> {current[name]}" for name in source if source[name] != current[name])


def _read_file(path: Path) -> tuple[dict[str, Tensor], Tensor | None, str]:
    """Read a file of ViT weights.

    Returns:
        The weights under timm's names, the positions, which are None if the file has none, and a description of where
        in the file the weights are.

    Raises:
        ValueError: if the file cannot be read, or holds no tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                # Unpickling could run any code that a downloaded file contains; weights_only reads tensors only.
                content = torch.load(path, map_location="cpu", weights_only=True)
        content, entries = _descend_entries(content)
    # torch passes on whatever damaged bytes lead to: UnpicklingError, RuntimeError, KeyError, EOFError, ...
    except Exception as error:
        raise ValueError(f"init_from: {path} cannot be read as weights: {_describe_refusal(path, error)}") from error
    weights, prefixes = _strip_prefixes(content)
    if not weights:
        raise ValueError(f"init_from: {path} holds no weights by name; save the model's state_dict()")
    positions = weights.pop(_POSITIONS, None)
    # Other projects also store weights in half precision; parameters here are float32.
    float_weights = {name: value.float() for name, value in weights.items() if not name.startswith(_DROPPED)}
    address = ".".join([*entries, *prefixes])
    return float_weights, positions, f"the weights under {address!r}" if address else "the weights"


def _describe_refusal(path: Path, error: Exception) -> str:
    """Return why a file cannot be read, and the remedy."""
    with path.open("rb") as file:
        foreign = recognise_text(file.read(NUM_BYTES))
    if foreign:
        return f"it {foreign.problem}; {foreign.remedy}"
    reason = next(iter(str(error).splitlines()), "") or type(error).__name__
    # torch's own message advises to switch the protection off, which would run code from the file.
    if isinstance(error, UnpicklingError):
        name = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it holds pickled objects other than tensors{f', such as {name[1]}' if name else ''}"
    return (
        f"{reason}; only tensors are read, never pickled code: save the model's state_dict() alone, or as .safetensors"
    )


def _descend_entries(content: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of the innermost entry that holds a model, and the names of the entries that lead to it."""
    if not isinstance(content, dict):
        return {}, []
    entry = next((name for name in _ENTRIES if isinstance(content.get(name), dict)), None)
    if entry is None:
        return {name: value for name, value in content.items() if isinstance(value, Tensor)}, []
    tensors, entries = _descend_entries(content[entry])
    return tensors, [entry, *entries]


def _strip_prefixes(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights below known prefixes, without other weights such as a predictor's, and the prefixes."""
    prefix = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in weights)), None)
    if prefix is None:
        return weights, []
    inner, prefixes = _strip_prefixes(
        {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
    )
    return inner, [prefix.removesuffix("."), *prefixes]


def _compare_positions(positions: Tensor | None, student: Student, path: Path) -> list[str]:
    """Return a remark if the file's positions, which are replaced by fixed ones, differ from those.

    Raises:
        ValueError: if they belong to a grid of another size.
    """
    if positions is None:
        return []
    grid, num_tokens = student.encoder.grid, positions.shape[1]
    # A class token's position comes first, if there is one.
    if num_tokens not in (grid**2, grid**2 + 1):
        raise ValueError(
            f"init_from: {path} has positions of {num_tokens} tokens, but this run has {grid} x {grid} patches; set "
            "views.size and model.encoder.patch_size to the values of the file's encoder"
        )
    fixed, from_file = sincos_positions(student.encoder.dim, grid), positions[0, -(grid**2) :].float()
    if from_file.shape == fixed.shape and torch.allclose(from_file, fixed, atol=1e-3):
        return []
    return ["its positions are not the fixed ones used here: features differ until training has adapted"]
