"""The pixel decoder of a checkpoint, a file beside the run and in exports.

<run>/decoder/step-00001500.safetensors    decodes the tokens of that checkpoint
<export>/pixel_decoder.safetensors         the same file

The file's header holds the `PixelDecoderSpec`, so that sizes and weights cannot be separated.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from iwm_fast.checkpoints.errors import CheckpointError, require_undamaged
from iwm_fast.checkpoints.reading import naming_file
from iwm_fast.config.loading import build, config_to_dict
from iwm_fast.models.pixel_decoder import PixelDecoder, PixelDecoderSpec
from iwm_fast.pipelines.storage.atomic import replace_file

EXPORTED_DECODER, DECODERS = "pixel_decoder.safetensors", "decoder"
_HEADER = "pixel_decoder"


def save_pixel_decoder(run: str | Path, decoder: PixelDecoder) -> Path:
    """Write a decoder beside its run, replacing an earlier one of the same checkpoint, and return its file.

    Raises:
        DiskError: if it cannot be written.
    """
    path = Path(run) / DECODERS / f"step-{decoder.spec.step:08d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().cpu().contiguous() for name, value in decoder.state_dict().items()}
    metadata = {"format": "pt", _HEADER: json.dumps(config_to_dict(decoder.spec))}
    replace_file(path, lambda draft: save_file(state, draft, metadata=metadata))
    return path


def find_pixel_decoder(folder: str | Path, step: int | None = None) -> Path:
    """Return the file of a run's or an export's decoder.

    Args:
        folder: folder of the run or export.
        step: optimiser steps of the checkpoint whose tokens are to be decoded; None: of the latest that has a decoder.

    Raises:
        FileNotFoundError: if there is none.
    """
    folder = Path(folder)
    found = {path: int(path.stem[5:]) for path in folder.glob(f"{DECODERS}/step-" + "[0-9]" * 8 + ".safetensors")}
    exported = folder / EXPORTED_DECODER
    if exported.is_file():
        found[exported] = read_spec(exported).step
    fitting = {path: at for path, at in found.items() if step in (None, at)}
    if not fitting:
        others = f"; it has one of step {', '.join(map(str, sorted(found.values())))}" if found else ""
        of_step, chosen = ("", "") if step is None else (f" of step {step}", f" checkpoint={step}")
        raise FileNotFoundError(
            f"{str(folder)!r} has no pixel decoder{of_step}{others}; train one with `iwm decode run={folder}{chosen}`"
        )
    return max(fitting, key=lambda path: fitting[path])


def read_spec(path: Path) -> PixelDecoderSpec:
    """Read the description of a decoder from the header of its file.

    Raises:
        CheckpointError: if the file is cut off, damaged, or holds no decoder.
    """
    with _naming_remedy(path), safe_open(path, "pt") as file:
        tree: Any = json.loads((file.metadata() or {})[_HEADER])
        return build(PixelDecoderSpec, tree)


def load_pixel_decoder(folder: str | Path, step: int | None = None, device: str | torch.device = "cpu") -> PixelDecoder:
    """Load the pixel decoder of a run or an export, frozen and in float32.

    Args:
        folder: folder of the run or export.
        step: optimiser steps of the checkpoint whose tokens are to be decoded, `WorldModel.step`; a decoder of another
            checkpoint would show something else. None: the latest that has a decoder.
        device: device to load it onto.

    Raises:
        FileNotFoundError: if there is no decoder, or none of this step.
        CheckpointError: if it is damaged.
    """
    path = find_pixel_decoder(folder, step)
    if path.name == EXPORTED_DECODER:
        require_undamaged(path.parent, (EXPORTED_DECODER,))
    decoder = PixelDecoder(read_spec(path))
    with _naming_remedy(path):
        decoder.load_state_dict(load_file(path))
    return decoder.requires_grad_(False).eval().to(device)


@contextmanager
def _naming_remedy(path: Path) -> Iterator[None]:
    """Name the file of a decoder, and what can be done, in the errors that its content causes in the `with` block."""
    try:
        with naming_file(path):
            yield
    except CheckpointError as error:
        error.add_note("delete it and run `iwm decode` again, which takes the trained decoder if that is complete")
        raise
