"""One portable checkpoint: weights and moments by parameter name, whole or not there at all.

    <run>/checkpoints/step-00001000/
        model.safetensors   the engine's state (see engine_state) and teacher/<name>
        state.json          progress, fingerprint, versions
        manifest.json       size and SHA-256 of both (see commit)

It knows nothing of ranks and ZeRO stages: any number of ranks and any engine continues from it.
"""

import json
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from iwm_fast.commit import CheckpointError, publish, published, remove, remove_leftovers, save_json, verify
from iwm_fast.distributed import Place, agree
from iwm_fast.engine import Engine
from iwm_fast.settings import is_of_the_stream
from pipelines.batch import PIXEL_MEAN, PIXEL_STD

FORMAT = 2
MODEL, STATE = "model.safetensors", "state.json"
TEACHER = "teacher/"

# the newest may be damaged by a failing disk; two older ones leave a way back and bound the space to three
NUM_OLDER_KEPT = 2

_PACKAGES = ("iwm-fast", "torch", "deepspeed", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What a checkpoint holds."""

    folder: Path
    """Where it was read from."""
    engine_state: dict[str, Tensor]
    """For `Engine.load_state`."""
    teacher_state: dict[str, Tensor]
    """The teacher's tensors under their own names, which are timm's."""
    step: int
    """Optimiser steps attempted."""
    applied_steps: int
    """Those that changed the weights."""
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


def write(
    run_folder: Path,
    *,
    engine_state: dict[str, Tensor],
    teacher_state: dict[str, Tensor],
    step: int,
    applied_steps: int,
    fingerprint: dict[str, Any],
    place: Place,
    counters: dict[str, Any] | None = None,
) -> Path:
    """Publish a checkpoint and remove the oldest; collective: rank 0 writes, the others wait for it.

    Raises:
        CheckpointError: on every rank, if writing failed or the step has a checkpoint already.
    """
    folder = run_folder / "checkpoints" / f"step-{step:08d}"
    state = {
        "format": FORMAT,
        "step": step,
        "applied_steps": applied_steps,
        "world_size": place.world_size,
        "fingerprint": fingerprint,
        "counters": counters or {},
        "versions": {name: _version(name) for name in _PACKAGES},
    }
    failure = None
    if place.rank == 0:
        tensors = engine_state | {TEACHER + name: tensor for name, tensor in teacher_state.items()}
        failure = _write_and_tidy(folder, tensors, state)
    # without this vote the other ranks would wait in the next step for one that is gone
    if agree(failure is not None, place.device):
        raise CheckpointError(f"rank 0 could not write {folder}: {failure or 'see its message'}") from failure
    return folder


def _write_and_tidy(folder: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> Exception | None:
    try:
        remove_leftovers(folder.parent)
        publish(folder, {MODEL: lambda path: _save_tensors(tensors, path), STATE: lambda path: save_json(state, path)})
        for old in published(folder.parent, "step-*")[: -1 - NUM_OLDER_KEPT]:
            remove(old)
    # whatever it was, the other ranks must hear of it; write() raises it on
    except Exception as error:
        return error
    return None


def _save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def newest(run_folder: Path) -> Path | None:
    """Return the folder of a run's newest checkpoint, None if it has none."""
    folders = published(run_folder / "checkpoints", "step-*")
    return folders[-1] if folders else None


def read(folder: Path) -> Checkpoint:
    """Read a checkpoint after comparing it with its manifest.

    Raises:
        CheckpointError: if it is damaged or of another format.
    """
    verify(folder, (MODEL, STATE))
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    saved_format = state.pop("format")
    if saved_format != FORMAT:
        raise CheckpointError(
            f"{folder} has format {saved_format}, not {FORMAT}; use the iwm-fast version that wrote it"
        )
    tensors = load_file(folder / MODEL)
    return Checkpoint(
        folder=folder,
        engine_state={name: tensor for name, tensor in tensors.items() if not name.startswith(TEACHER)},
        teacher_state={name.removeprefix(TEACHER): row for name, row in tensors.items() if name.startswith(TEACHER)},
        **state,
    )


def differing_settings(saved: dict[str, Any], current: dict[str, Any], *, may_restart: bool = False) -> list[str]:
    """Return which settings differ between two fingerprints, none unless they may.

    Args:
        saved: the checkpoint's.
        current: this run's.
        may_restart: whether what only decides the data stream may differ.

    Raises:
        CheckpointError: listing every setting that differs and must not.
    """
    names = sorted(name for name in saved.keys() | current.keys() if saved.get(name) != current.get(name))
    of_the_stream = [name for name in names if is_of_the_stream(name)]
    if not names or (may_restart and names == of_the_stream):
        return names
    rows = "\n".join(f"  {name}: {saved.get(name)} -> {current.get(name)}" for name in names)
    way_out = "data.restart_epoch=true goes on with these weights and begins the current epoch anew; otherwise "
    raise CheckpointError(
        f"the checkpoint was made with other settings (saved -> now):\n{rows}\n"
        f"{way_out if names == of_the_stream else ''}set them back, or name another output.folder to start a new run"
    )


def restore(checkpoint: Checkpoint, engine: Engine) -> None:
    """Give an engine a checkpoint's weights and moments; collective.

    Raises:
        CheckpointError: if the model has other parameters, naming the first that differs.
    """
    try:
        engine.load_state(checkpoint.engine_state)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder} is of another model: {error}; set model back as it was") from error


def export_encoder(checkpoint: Checkpoint, destination: Path) -> None:
    """Write the teacher's encoder for timm: `encoder.safetensors`, and `config.json` with the call that loads it.

    Raises:
        CheckpointError: if the destination exists.
    """
    arguments = timm_arguments(checkpoint.fingerprint)
    written_out = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    described = {
        "call": f"timm.models.vision_transformer.VisionTransformer({written_out})",
        "load": "safetensors.torch.load_model(model, 'encoder.safetensors')",
        "arguments": arguments,
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
        "step": checkpoint.step,
        "versions": checkpoint.versions,
    }
    writers = {
        "encoder.safetensors": lambda path: _save_tensors(checkpoint.teacher_state, path),
        "config.json": lambda path: save_json(described, path),
    }
    publish(destination, writers)


def timm_arguments(fingerprint: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of timm's VisionTransformer that make this run's encoder: all patches, no class token."""
    return {
        "img_size": fingerprint["views.size"],
        "patch_size": fingerprint["model.encoder.patch_size"],
        "embed_dim": fingerprint["model.encoder.dim"],
        "depth": fingerprint["model.encoder.depth"],
        "num_heads": fingerprint["model.encoder.num_heads"],
        "mlp_ratio": fingerprint["model.encoder.mlp_ratio"],
        "class_token": False,
        "num_classes": 0,
        # features are the mean over patches after the final norm
        "global_pool": "avg",
        "fc_norm": False,
    }
