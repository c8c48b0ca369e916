"""`init_from`: whose weights a run starts with, instead of drawn ones.

Three kinds of source: a run's folder (its newest checkpoint), an export folder, or a file of a ViT under timm's names,
as timm, I-JEPA and most others write them. The encoder takes the source's teacher where it has one, and the run's own
teacher begins as its copy. Nothing is left out silently: a block that is missing, superfluous or of another shape is an
error that names it.
"""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.export import is_export, read_export
from iwm_fast.config.loading import load_config
from iwm_fast.config.run import RunConfig
from iwm_fast.models.layers import sincos_positions
from iwm_fast.models.student import Student
from iwm_fast.runtime import distributed

log = logging.getLogger(__name__)

# where files keep a model's weights; the teacher's come first, which is what one evaluates
_ENTRIES = ("target_encoder", "teacher", "encoder", "model", "state_dict")
_PREFIXES = ("module.", "backbone.", "target_encoder.", "teacher.", "encoder.", "model.")
# what a ViT may have beside its blocks, and this one has not
_DROPPED = ("cls_token", "mask_token", "head.", "head_dist.")
_POSITIONS = "pos_embed"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Weights to start with."""

    encoder: dict[str, Tensor]
    """Under timm's names, without positions."""
    predictor: dict[str, Tensor]
    """Under ours; empty if there are none that fit."""
    remarks: tuple[str, ...]
    """What a user should know of them, one sentence each."""


def is_fresh_start(config: RunConfig) -> bool:
    """Return whether no checkpoint would be gone on from; the same on every rank, collective."""
    return distributed.broadcast_from_rank_zero(lambda: checkpoints.newest(Path(config.output.folder)) is None)


def initialize_from(config: RunConfig, student: Student) -> None:
    """Overwrite a student's drawn weights, in place, with those that `init_from` names; nothing if it names none.

    Not for a run that goes on: its weights come from its own checkpoint, and the source may be gone by then.

    Raises:
        FileNotFoundError: if there is no such file or folder.
        ValueError: if it holds no weights that fit, naming the first that does not.
        CheckpointError: if a folder's files are damaged.
    """
    if not config.init_from or not is_fresh_start(config):
        return
    source = read_source(config, student)
    student.encoder.load_state_dict(source.encoder | {_POSITIONS: student.encoder.pos_embed})
    if source.predictor:
        student.predictor.load_state_dict(source.predictor)
    for remark in source.remarks:
        log.info("init_from: %s", remark)


def read_source(config: RunConfig, student: Student) -> Source:
    """Read the weights that `init_from` names and check that they fit a student, which may be on the meta device.

    Raises:
        FileNotFoundError, ValueError, CheckpointError: as `initialize_from`.
    """
    path = Path(config.init_from)
    if path.is_file():
        found, positions, taken = _read_file(path)
        remark = f"the encoder starts with {taken} of {path}"
        remarks = (remark, *_compare_positions(positions, student, path))
        source = Source(encoder=found, predictor={}, remarks=remarks)
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
    expected = dict(module.named_parameters())
    for name, parameter in expected.items():
        if name not in weights:
            known = ", ".join(list(weights)[:3])
            raise ValueError(f"init_from: {path} has no {name}, which this encoder needs; it has {known} ...")
        if weights[name].shape != parameter.shape:
            raise ValueError(
                f"init_from: {name} of {path} has shape {tuple(weights[name].shape)}, here it must have "
                f"{tuple(parameter.shape)}; set model.encoder as the file's encoder is"
            )
    superfluous = [name for name in weights if name not in expected]
    if superfluous:
        raise ValueError(
            f"init_from: {path} has {superfluous[0]}, which this encoder has not: it is of another architecture or "
            "depth; set model.encoder as the file's encoder is"
        )


def _read_folder(path: Path, config: RunConfig, student: Student) -> Source:
    """Read a run or an export, both of which know the settings that their weights belong to."""
    if is_export(path):
        exported = read_export(path)
        theirs, encoder, predictor = exported.config, exported.encoder_state, exported.predictor_state
        step = exported.step
    else:
        saved, _ = checkpoints.read_newest(path)
        if saved is None:
            raise FileNotFoundError(
                f"init_from = {str(path)!r} holds neither an export nor a run with a checkpoint; name one that does"
            )
        theirs = load_config(saved.folder / checkpoints.CONFIG)
        encoder, predictor, step = saved.teacher_state, saved.weights("predictor."), saved.step
    _require_same_encoder(theirs, config, path)
    named = f"the encoder starts with the teacher of {path}, step {step}"
    # positions follow from the grid, so weights may go on at another size of views
    encoder = {name: value for name, value in encoder.items() if name != _POSITIONS}
    unfit = _predictor_mismatch(theirs, config, predictor, student)
    remarks = (named,)
    if config.model.predictor.depth > 0:
        remarks = (named, f"the predictor starts anew, {unfit}" if unfit else "the predictor starts with the one there")
    return Source(encoder=encoder, predictor={} if unfit else predictor, remarks=remarks)


def _require_same_encoder(theirs: RunConfig, ours: RunConfig, path: Path) -> None:
    # heads leave no trace in shapes: weights would fit and mean something else
    if theirs.model.encoder != ours.model.encoder:
        given, wanted = asdict(theirs.model.encoder), asdict(ours.model.encoder)
        rows = ", ".join(f"{name} {given[name]} -> {wanted[name]}" for name in given if given[name] != wanted[name])
        raise ValueError(f"init_from: {path} has another encoder (there -> here: {rows}); set model.encoder as there")


def _predictor_mismatch(theirs: RunConfig, ours: RunConfig, weights: dict[str, Tensor], student: Student) -> str | None:
    """Return why a predictor of other settings cannot be taken over, None if it can.

    Raises:
        ValueError: if it is of the same settings and its action means something else.
    """
    if theirs.model.predictor != ours.model.predictor:
        given, wanted = (asdict(config.model.predictor) for config in (theirs, ours))
        rows = ", ".join(f"{name} {given[name]} -> {wanted[name]}" for name in given if given[name] != wanted[name])
        return f"its settings differ (there -> here: {rows})"
    is_conditioned = ours.model.predictor.conditioning != "none"
    if is_conditioned and theirs.views.entries != ours.views.entries:
        raise ValueError(
            f"init_from: the predictor of {ours.init_from} knows the action entries {theirs.views.entries}, this run "
            f"{ours.views.entries}; set views as there, or take the encoder alone: export the run, and name the "
            "export's encoder.safetensors"
        )
    _require_fit(weights, student.predictor, Path(ours.init_from))
    return None


def _read_file(path: Path) -> tuple[dict[str, Tensor], Tensor | None, str]:
    """Return weights under timm's names, positions apart, and where in the file they stood.

    Raises:
        ValueError: if it cannot be read, or holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"init_from: {path} cannot be read as weights ({reason}); only tensors are read, never pickled code: save "
            "the model's state_dict() alone, or as .safetensors"
        ) from error
    content, entries = _without_entries(content)
    weights, prefixes = _without_prefixes(content)
    if not weights:
        raise ValueError(f"init_from: {path} holds no weights by name; save the model's state_dict()")
    positions = weights.pop(_POSITIONS, None)
    kept = {name: value.float() for name, value in weights.items() if not name.startswith(_DROPPED)}
    place = ".".join([*entries, *prefixes])
    return kept, positions, f"the weights under {place!r}" if place else "the weights"


def _without_entries(content: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Descend into the entry that holds the model; return its tensors, and the entries on the way."""
    if not isinstance(content, dict):
        return {}, []
    found = next((name for name in _ENTRIES if isinstance(content.get(name), dict)), None)
    if found is None:
        return {name: value for name, value in content.items() if isinstance(value, Tensor)}, []
    inner, entries = _without_entries(content[found])
    return inner, [found, *entries]


def _without_prefixes(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Descend into the part that prefixes name; what stands beside it, such as a predictor, stays behind."""
    found = next((prefix for prefix in _PREFIXES if any(name.startswith(prefix) for name in weights)), None)
    if found is None:
        return weights, []
    inner, prefixes = _without_prefixes(
        {name.removeprefix(found): value for name, value in weights.items() if name.startswith(found)}
    )
    return inner, [found.removesuffix("."), *prefixes]


def _compare_positions(positions: Tensor | None, student: Student, path: Path) -> list[str]:
    """Return what to say of the file's positions, which give way to ours.

    Raises:
        ValueError: if they are of another grid.
    """
    if positions is None:
        return []
    grid, num_tokens = student.encoder.grid, positions.shape[1]
    # a class token's position comes first
    if num_tokens not in (grid**2, grid**2 + 1):
        raise ValueError(
            f"init_from: {path} has positions of {num_tokens} tokens, this run has {grid} x {grid} patches; set "
            "views.size and model.encoder.patch_size as there"
        )
    ours, theirs = sincos_positions(student.encoder.dim, grid), positions[0, -(grid**2) :].float()
    if theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-3):
        return []
    return ["its positions are not the fixed ones used here: features differ until training has adapted"]
