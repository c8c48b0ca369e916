"""A portable checkpoint: weights and moments by parameter name, in a folder that exists complete or not at all.

    <run>/checkpoints/step-00001000/
        model.safetensors   the engine's state (see portable_state) and teacher/<name>
        state.json          progress, run_id, fingerprint, versions
        config.yaml         all settings of the run that wrote it
        manifest.json       size and SHA-256 of each file (see pipelines.storage.atomic)

It depends on neither ranks nor ZeRO stages: any number of ranks and any engine can continue from it. It holds no state
of a random generator because none is needed: sample order, crops, actions and masks are pure functions of (seed, step,
slot), and networks draw no random numbers after their initialisation. Torch's global generator is left out on purpose:
a run that used rank 0's generator could not continue in the same way with another number of ranks.
"""

import logging
import math
import os
import re
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from iwm_fast.checkpoints.errors import CheckpointError, require_undamaged
from iwm_fast.checkpoints.reading import naming_file, read_json, read_tensors
from iwm_fast.config.fingerprint import ADJUSTABLE, IMAGES_PER_FORWARD, defines_sample_stream
from iwm_fast.config.loading import save_config
from iwm_fast.config.run import RunConfig
from iwm_fast.engines.base import Engine
from iwm_fast.pipelines.storage.atomic import write_folder, write_json
from iwm_fast.pipelines.transforms.composition import RENAMED
from iwm_fast.runtime.json_lines import STARTED_FILE, read_starts

log = logging.getLogger(__name__)

FORMAT = 3
MODEL, STATE, CONFIG = "model.safetensors", "state.json", "config.yaml"
TEACHER_PREFIX = "teacher/"

_PACKAGES = ("iwm-fast", "torch", "deepspeed", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The contents of a checkpoint. Fields other than folder and tensors are the entries of state.json."""

    folder: Path
    """The folder that holds the checkpoint."""
    engine_state: dict[str, Tensor]
    """Weights and moments, for `Engine.load_state`."""
    teacher_state: dict[str, Tensor]
    """The teacher's tensors under their own names, which are timm's."""
    step: int
    """Number of optimiser steps attempted."""
    applied_steps: int
    """Number of optimiser steps that changed the weights."""
    run_id: str
    """The run's name for loggers, which stays the same however often the run is resumed."""
    fingerprint: dict[str, Any]
    """The settings that decide the result, by dotted name."""
    world_size: int
    """Number of ranks of the run that wrote it; any number may read it."""
    counters: dict[str, Any]
    """Further values that the training loop stores, fit for JSON."""
    versions: dict[str, str]
    """Versions of the packages that wrote it."""

    @property
    def best_step(self) -> int | None:
        """The best step of the run when it was written, by `output.keep_best`; None without one."""
        return _best_step(self.counters)

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """Return the trained weights whose names begin with the prefix, without it; no moments and no buffers."""
        start = f"weight/{prefix}"
        state = self.engine_state
        return {name.removeprefix(start): state[name] for name in state if name.startswith(start)}

    @property
    def student_state(self) -> dict[str, Tensor]:
        """The tensors of the encoder that was trained by gradient descent, under timm's names."""
        # Positions are fixed and therefore not among the trained weights.
        return self.weights("encoder.") | {"pos_embed": self.teacher_state["pos_embed"]}


_NOT_IN_STATE = ("folder", "engine_state", "teacher_state")
_STATE_ENTRIES = [field.name for field in fields(Checkpoint) if field.name not in _NOT_IN_STATE]
_FOLDER_NAME = re.compile(r"step-\d{8,}")

_RESTART = "data.restart_epoch=true continues with these weights and restarts the current epoch"
_EXTEND = "resume=extend continues with schedules for the new number of epochs"
_ADJUST = "resume=adjust continues with the new values from here on"


def write(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Write a checkpoint to its folder, which appears complete or not at all.

    Raises:
        FileExistsError: if the folder exists.
        DiskError: if the disk is full or the folder cannot be written.
    """
    teacher = {TEACHER_PREFIX + name: tensor for name, tensor in checkpoint.teacher_state.items()}
    tensors = checkpoint.engine_state | teacher
    state = {"format": FORMAT} | {name: getattr(checkpoint, name) for name in _STATE_ENTRIES}
    writers = {
        MODEL: lambda path: _save_tensors(tensors, path),
        STATE: lambda path: write_json(state, path),
        CONFIG: lambda path: save_config(config, path),
    }
    write_folder(checkpoint.folder, writers)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    # safetensors writes only contiguous tensors.
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    # safetensors reports a full disk as an error of its own, whose text has the number.
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(number[1]), str(error)) if number else OSError(f"{path}: {error}")) from error


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that a checkpoint depends on."""
    return {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def checkpoint_folder(run_folder: Path, step: int) -> Path:
    """Return the folder of a run's checkpoint of a step, whether it exists or not."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def parse_step(folder: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def list_checkpoint_folders(run_folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints in order of step, without checking them for damage.

    Raises:
        CheckpointError: if there is something in the place of the folder `checkpoints` that cannot be listed.
    """
    # Unlike `glob`, this raises if the folder cannot be read: a run must not start again from scratch then.
    parent = run_folder / "checkpoints"
    try:
        paths = list(parent.iterdir())
    except OSError as error:
        # A link to a disk that is not mounted exists all the same.
        if not os.path.lexists(parent):
            return []
        raise CheckpointError(
            f"{parent} cannot be read ({error.strerror}); make it a readable folder, or name another output.folder"
        ) from error
    # The pattern excludes folders that were set aside, such as step-00001000.refused.
    return sorted((path for path in paths if _FOLDER_NAME.fullmatch(path.name)), key=parse_step)


def find_newest_folder(run_folder: Path) -> Path | None:
    """Return the folder of a run's newest checkpoint, None if it has none, without checking that it is undamaged."""
    folders = list_checkpoint_folders(run_folder)
    return folders[-1] if folders else None


def read_newest(run_folder: Path) -> tuple[Checkpoint | None, dict[Path, CheckpointError]]:
    """Read the newest undamaged checkpoint that a run has written.

    Returns:
        The checkpoint, None if the run has none at all, and the errors of refused newer ones by folder: those that are
        damaged, and those that another run has written.

    Raises:
        CheckpointError: if there are checkpoints but all are refused, naming all.
    """
    refused: dict[Path, CheckpointError] = {}
    run_ids = list_run_ids(run_folder)
    for folder in reversed(list_checkpoint_folders(run_folder)):
        try:
            saved = read(folder)
            _require_same_run(saved, run_ids)
            return saved, refused
        except CheckpointError as error:
            # A training run may have removed this checkpoint while we read it. There must be a newer one now.
            if not os.path.lexists(folder):
                return read_newest(run_folder)
            refused[folder] = error
    if refused:
        rows = "\n".join(f"  {error}" for error in refused.values())
        raise CheckpointError(
            f"none of the checkpoints in {run_folder / 'checkpoints'} can be used:\n{rows}\n"
            "restore one from a backup, or name another output.folder to start a new run"
        )
    return None, refused


def list_run_ids(run_folder: Path) -> list[str]:
    """Return the ids that a run recorded at its starts, the latest one last; normally they are all the same."""
    return [start["run_id"] for start in read_starts(run_folder) if isinstance(start.get("run_id"), str)]


def _require_same_run(saved: Checkpoint, run_ids: list[str]) -> None:
    # Without a record, the checkpoints were copied into a new folder on purpose.
    if run_ids and saved.run_id not in run_ids:
        raise CheckpointError(
            f"{saved.folder} was written by run {saved.run_id}, and {STARTED_FILE} has only starts of run "
            f"{run_ids[-1]}: it was copied here from another run; remove {STARTED_FILE} to use it all the same"
        )


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder has the files of a checkpoint, without reading them."""
    return (folder / STATE).is_file() and (folder / MODEL).is_file()


def read_chosen(folder: Path, checkpoint: int | str | Path | None = None) -> Checkpoint:
    """Read one checkpoint of a run, the newest undamaged one unless another is chosen.

    Args:
        folder: the run's folder, or the folder of a checkpoint.
        checkpoint: a step, the path or name of the checkpoint's folder, or best for the one that `output.keep_best`
            kept; None or empty: the newest.

    Raises:
        FileNotFoundError: if the run has no checkpoint, or not the chosen one, listing those it has.
        CheckpointError: if the chosen checkpoint is damaged, or all of them are.
    """
    if checkpoint not in (None, ""):
        return read(_find(folder, str(checkpoint)))
    if is_checkpoint(folder):
        return read(folder)
    saved, damaged = read_newest(folder)
    if saved is None:
        raise FileNotFoundError(f"{str(folder)!r} has no checkpoint yet; wait for output.checkpoint_every steps")
    for reason in damaged.values():
        log.warning("%s; loading step %d instead", reason, saved.step)
    return saved


def _find(run_folder: Path, checkpoint: str) -> Path:
    """Return the folder of a run's checkpoint that is given by its step, its path or its name."""
    folders = list_checkpoint_folders(run_folder)
    if checkpoint == "best":
        checkpoint = str(_find_best_step(run_folder, folders))
    for folder in folders:
        is_same_path = Path(checkpoint).resolve() == folder.resolve()
        if is_same_path or checkpoint in (str(parse_step(folder)), folder.name):
            return folder
    steps = ", ".join(str(parse_step(folder)) for folder in folders) or "none yet"
    raise FileNotFoundError(
        f"checkpoint must be a step of which {str(run_folder)!r} has a checkpoint ({steps}), or the folder of one, "
        f"got {checkpoint!r}"
    )


def _find_best_step(run_folder: Path, folders: list[Path]) -> int:
    # The newest one that can be read knows it. The gigabytes of its tensors are not needed.
    for folder in reversed(folders):
        with suppress(CheckpointError, OSError):
            step = _best_step(read_json(folder / STATE, ["counters"])["counters"])
            if step is not None:
                return step
    raise FileNotFoundError(f"{str(run_folder)!r} has no best checkpoint; train with output.keep_best to keep one")


def _best_step(counters: dict[str, Any]) -> int | None:
    return (counters.get("best") or {}).get("step")


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint and check its files against the manifest.

    Raises:
        CheckpointError: if it is damaged, has another format, or holds another step than its folder's name says.
    """
    # The format comes first: another version of the project may have written other files.
    require_undamaged(folder, (STATE,))
    state = read_json(folder / STATE)
    saved_format = state.pop("format", None)
    if saved_format != FORMAT:
        raise CheckpointError(
            f"{folder} has format {saved_format}, not {FORMAT}; use the iwm-fast version that wrote it"
        )
    # A folder outside of a run may have any name.
    if _FOLDER_NAME.fullmatch(folder.name) and parse_step(folder) != state["step"]:
        raise CheckpointError(
            f"{folder} holds step {state['step']}: it was copied or renamed; give it the name of that step, or move it "
            "out of the folder"
        )
    require_undamaged(folder, (MODEL, CONFIG))
    if isinstance(state.get("fingerprint"), dict):
        state["fingerprint"] = {RENAMED.get(name, name): value for name, value in state["fingerprint"].items()}
    tensors = read_tensors(folder / MODEL)
    teacher = {name: tensor for name, tensor in tensors.items() if name.startswith(TEACHER_PREFIX)}
    with naming_file(folder / STATE):
        return Checkpoint(
            folder=folder,
            engine_state={name: tensor for name, tensor in tensors.items() if name not in teacher},
            teacher_state={name.removeprefix(TEACHER_PREFIX): tensor for name, tensor in teacher.items()},
            **state,
        )


def differing_settings(
    saved: dict[str, Any],
    current: dict[str, Any],
    *,
    may_restart: bool = False,
    may_extend: bool = False,
    may_adjust: bool = False,
) -> list[str]:
    """Compare two fingerprints.

    Args:
        saved: the checkpoint's fingerprint.
        current: this run's fingerprint.
        may_restart: whether settings that only define the stream of samples may differ.
        may_extend: whether the number of epochs may differ, and a warm-up that is the same share of it.
        may_adjust: whether the settings in `ADJUSTABLE` may differ.

    Returns:
        Sorted names of the settings that differ, all of which are allowed to.

    Raises:
        CheckpointError: if a setting differs that must not, listing all that differ.
    """
    names = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
    if IMAGES_PER_FORWARD not in saved:
        names = [name for name in names if name != IMAGES_PER_FORWARD]
    remedies = {_remedy(name, saved, current) for name in names}
    may_extend = may_extend or may_adjust
    options = ((_RESTART, may_restart), (_EXTEND, may_extend), (_ADJUST, may_adjust))
    if remedies <= {remedy for remedy, is_allowed in options if is_allowed}:
        return names
    rows = "\n".join(f"  {name}: {saved.get(name)} -> {current.get(name)}" for name in names)
    # What can be extended can also be adjusted.
    if _ADJUST in remedies:
        remedies.discard(_EXTEND)
    # An empty remedy means that no option allows one of the differences, so there is nothing to suggest.
    hint = "" if "" in remedies else ", and ".join(sorted(remedies)) + "; otherwise "
    raise CheckpointError(
        f"the checkpoint was made with other settings (saved -> now):\n{rows}\n"
        f"{hint}set them back, or name another output.folder to start a new run"
    )


def _remedy(name: str, saved: dict[str, Any], current: dict[str, Any]) -> str:
    """Return the option that allows a setting to differ, as a sentence; empty if there is none."""
    if defines_sample_stream(name):
        return _RESTART
    # A warm-up that was left unset is a share of the epochs, and is stretched like the other schedules.
    shares = [tree.get("optim.warmup_epochs", 0) / tree.get("optim.epochs", 1) for tree in (saved, current)]
    if name == "optim.epochs" or (name == "optim.warmup_epochs" and math.isclose(*shares)):
        return _EXTEND
    return _ADJUST if name in ADJUSTABLE else ""


def restore(checkpoint: Checkpoint, engine: Engine) -> None:
    """Overwrite an engine's weights and moments with those of a checkpoint. Collective: every rank must call it.

    Raises:
        CheckpointError: if the model has other parameters, naming the first that differs.
    """
    try:
        engine.load_state(checkpoint.engine_state)
    except ValueError as error:
        raise CheckpointError(
            f"{checkpoint.folder} does not fit this model: {error}; set model back to its earlier values"
        ) from error
