"""One portable checkpoint: weights and moments by parameter name, whole or not there at all.

    <run>/checkpoints/step-00001000/
        model.safetensors   the engine's state (see portable_state) and teacher/<name>
        state.json          progress, run_id, fingerprint, versions
        config.yaml         every setting of the run that wrote it
        manifest.json       size and SHA-256 of each (see pipelines.storage.atomic)

It knows nothing of ranks and ZeRO stages: any number of ranks and any engine continues from it. It holds no state of a
random generator, because there is none: sample order, crops, actions and masks are pure functions of (seed, step,
slot), and networks draw nothing once their weights are drawn. Torch's global generator is left out on purpose: a run
that drew from rank 0's could not go on alike with other ranks.
"""

import json
import re
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from iwm_fast.checkpoints.errors import CheckpointError, require_undamaged
from iwm_fast.config.fingerprint import defines_sample_stream
from iwm_fast.config.loading import save_config
from iwm_fast.config.run import RunConfig
from iwm_fast.engines.base import Engine
from iwm_fast.pipelines.storage.atomic import publish, save_json

FORMAT = 3
MODEL, STATE, CONFIG = "model.safetensors", "state.json", "config.yaml"
TEACHER = "teacher/"

_PACKAGES = ("iwm-fast", "torch", "deepspeed", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds."""

    folder: Path
    """Where it is."""
    engine_state: dict[str, Tensor]
    """For `Engine.load_state`."""
    teacher_state: dict[str, Tensor]
    """The teacher's tensors under their own names, which are timm's."""
    step: int
    """Optimiser steps attempted."""
    applied_steps: int
    """Those that changed the weights."""
    run_id: str
    """The run's name for loggers, the same from its first start to its last."""
    fingerprint: dict[str, Any]
    """The settings that decide the result, flat."""
    world_size: int
    """Ranks of the run that wrote it; any number may read it."""
    counters: dict[str, Any]
    """Whatever else the loop wants to keep, fit for JSON."""
    versions: dict[str, str]
    """Packages that wrote it."""

    def weights(self, prefix: str) -> dict[str, Tensor]:
        """Return the trained weights whose names begin with the prefix, without it; no moments, no buffers."""
        start = f"weight/{prefix}"
        state = self.engine_state
        return {name.removeprefix(start): state[name] for name in state if name.startswith(start)}


_IN_STATE = [one.name for one in fields(Checkpoint) if one.name not in ("folder", "engine_state", "teacher_state")]
_NAME = re.compile(r"step-\d{8,}")

_RESTART = "data.restart_epoch=true goes on with these weights and begins the current epoch anew"
_EXTEND = "resume=extend goes on with schedules laid out over the other number of epochs"


def write(checkpoint: Checkpoint, config: RunConfig) -> None:
    """Publish a checkpoint in its folder, whole or not at all.

    Raises:
        FileExistsError: if the folder exists.
        OSError: if the disk is full or does not let us.
    """
    tensors = checkpoint.engine_state | {TEACHER + name: value for name, value in checkpoint.teacher_state.items()}
    state = {"format": FORMAT} | {name: getattr(checkpoint, name) for name in _IN_STATE}
    writers = {
        MODEL: lambda path: _save_tensors(tensors, path),
        STATE: lambda path: save_json(state, path),
        CONFIG: lambda path: save_config(config, path),
    }
    publish(checkpoint.folder, writers)


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def package_versions() -> dict[str, str]:
    """Return the versions of what a checkpoint depends on."""
    return {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def folder_of(run_folder: Path, step: int) -> Path:
    """Return where a run's checkpoint of a step lies."""
    return run_folder / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def step_folders(run_folder: Path) -> list[Path]:
    """Return the folders of a run's checkpoints in order of step, without looking whether they are whole."""
    found = (run_folder / "checkpoints").glob("step-*")
    return sorted((path for path in found if _NAME.fullmatch(path.name)), key=step_of)


def newest(run_folder: Path) -> Path | None:
    """Return the folder of a run's newest checkpoint, None if it has none; `read` tells whether it is whole."""
    folders = step_folders(run_folder)
    return folders[-1] if folders else None


def read_newest(run_folder: Path) -> tuple[Checkpoint | None, dict[Path, CheckpointError]]:
    """Return a run's newest whole checkpoint, None if it has none at all, and what is wrong with those behind it.

    Raises:
        CheckpointError: if there are checkpoints but none is whole, naming all.
    """
    refused: dict[Path, CheckpointError] = {}
    for folder in reversed(step_folders(run_folder)):
        try:
            return read(folder), refused
        except CheckpointError as error:
            # a training run removes its old ones while others read
            if not folder.exists():
                return read_newest(run_folder)
            refused[folder] = error
    if refused:
        rows = "\n".join(f"  {error}" for error in refused.values())
        raise CheckpointError(
            f"none of the checkpoints in {run_folder / 'checkpoints'} can be used:\n{rows}\n"
            "put one back from a copy, or name another output.folder to start a new run"
        )
    return None, refused


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint after comparing it with its manifest.

    Raises:
        CheckpointError: if it is damaged or of another format.
    """
    require_undamaged(folder, (STATE,))
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    saved_format = state.pop("format", None)
    if saved_format != FORMAT:
        raise CheckpointError(
            f"{folder} has format {saved_format}, not {FORMAT}; use the iwm-fast version that wrote it"
        )
    require_undamaged(folder, (MODEL, CONFIG))
    tensors = load_file(folder / MODEL)
    return Checkpoint(
        folder=folder,
        engine_state={name: tensor for name, tensor in tensors.items() if not name.startswith(TEACHER)},
        teacher_state={name.removeprefix(TEACHER): row for name, row in tensors.items() if name.startswith(TEACHER)},
        **state,
    )


def differing_settings(
    saved: dict[str, Any], current: dict[str, Any], *, may_restart: bool = False, may_extend: bool = False
) -> list[str]:
    """Return which settings differ between two fingerprints, none unless they may.

    Args:
        saved: the checkpoint's.
        current: this run's.
        may_restart: whether what only decides the data stream may differ.
        may_extend: whether the number of epochs may differ.

    Raises:
        CheckpointError: listing every setting that differs and must not.
    """
    names = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
    ways_out = {_remedy(name) for name in names}
    if ways_out <= {way for way, is_allowed in ((_RESTART, may_restart), (_EXTEND, may_extend)) if is_allowed}:
        return names
    rows = "\n".join(f"  {name}: {saved.get(name)} -> {current.get(name)}" for name in names)
    hint = "" if "" in ways_out else ", and ".join(sorted(ways_out)) + "; otherwise "
    raise CheckpointError(
        f"the checkpoint was made with other settings (saved -> now):\n{rows}\n"
        f"{hint}set them back, or name another output.folder to start a new run"
    )


def _remedy(name: str) -> str:
    if defines_sample_stream(name):
        return _RESTART
    return _EXTEND if name == "optim.epochs" else ""


def restore(checkpoint: Checkpoint, engine: Engine) -> None:
    """Give an engine a checkpoint's weights and moments; collective.

    Raises:
        CheckpointError: if the model has other parameters, naming the first that differs.
    """
    try:
        engine.load_state(checkpoint.engine_state)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder} is of another model: {error}; set model back as it was") from error
