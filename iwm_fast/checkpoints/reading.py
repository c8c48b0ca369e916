"""Reads files of runs and exports, whose content may be anything, even where sizes and hashes are as recorded."""

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.config.run import RunConfig
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.layers import sincos_positions
from iwm_fast.models.student import build_student

_BLOCK = re.compile(r"blocks\.(\d+)\.")
# What reading JSON, YAML, tensors and settings raises if their content is wrong.
_WRONG_CONTENT = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, SafetensorError
)  # fmt: skip


@contextmanager
def naming_file(path: Path) -> Iterator[None]:
    """Name a file in the errors that its content causes in the `with` block.

    Raises:
        CheckpointError: in place of the error that was raised.
    """
    try:
        yield
    except _WRONG_CONTENT as error:
        reason = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} cannot be used: {reason}") from error


def read_json(path: Path, entries: Collection[str] = ()) -> dict[str, Any]:
    """Read a JSON object that has at least these entries.

    Raises:
        CheckpointError: if the file holds something else.
    """
    with naming_file(path):
        tree = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
        if not isinstance(tree, dict):
            raise ValueError(f"it must hold a JSON object, got {type(tree).__name__}")
        missing = [name for name in entries if name not in tree]
        if missing:
            raise ValueError(f"it has no {', '.join(missing)}")
    return tree


def _refuse_constant(name: str) -> float:
    raise ValueError(f"it holds {name}, which is not JSON")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        CheckpointError: if it is cut off or damaged.
    """
    with naming_file(path):
        return load_file(path)


def require_networks_fit(
    config: RunConfig, encoder_state: dict[str, Tensor], predictor_state: dict[str, Tensor], origin: Path
) -> None:
    """Check that settings describe networks with exactly these weights; no memory is taken for the networks.

    Raises:
        CheckpointError: naming the first difference, and `origin` as where the settings come from.
    """
    # Wrong settings may describe networks too large to build, so that depth and positions are compared first.
    states = {"encoder": encoder_state, "predictor": predictor_state}
    for name, state in states.items():
        depth = 1 + max((int(block[1]) for key in state if (block := _BLOCK.match(key))), default=-1)
        if getattr(config.model, name).depth != depth:
            _refuse(
                origin, f"model.{name}.depth is {getattr(config.model, name).depth}, the weights have {depth} blocks"
            )
    expected = (1, config.grid**2, config.model.encoder.dim)
    positions = encoder_state.get("pos_embed")
    if positions is None or tuple(positions.shape) != expected:
        shape = "none" if positions is None else tuple(positions.shape)
        _refuse(origin, f"views.size, patch_size and dim give positions of shape {expected}, the weights have {shape}")
    with naming_file(origin), torch.device("meta"):
        try:
            student = build_student(config, REFERENCE)
        # torch reports sizes that it cannot count with.
        except RuntimeError as error:
            _refuse(origin, f"its networks cannot be built ({str(error).splitlines()[0]})")
    for name, state in states.items():
        shapes = {key: tuple(value.shape) for key, value in getattr(student, name).state_dict().items()}
        actual = {key: tuple(value.shape) for key, value in state.items()}
        differing = [key for key in {**shapes, **actual} if shapes.get(key) != actual.get(key)]
        if differing:
            key = differing[0]
            problem = f"needs {key} of shape {shapes.get(key, 'none')}, the weights have {actual.get(key, 'none')}"
            _refuse(origin, f"the {name} that it describes {problem}")


def with_positions(encoder_state: dict[str, Tensor], config: RunConfig) -> dict[str, Tensor]:
    """Return an encoder's tensors for the image size of the settings: positions are recomputed if it is another one."""
    if encoder_state["pos_embed"].shape[1] == config.grid**2:
        return encoder_state
    return encoder_state | {"pos_embed": sincos_positions(config.model.encoder.dim, config.grid)[None]}


def _refuse(origin: Path, problem: str) -> None:
    raise CheckpointError(f"{origin} does not belong to the weights: {problem}")
