"""A sheet of images above maps of their patch features: the first three principal components as red, green and blue.

Patches with similar features have similar colours, across images too: the components are those of the patches of all
images shown. Colours have no other meaning, and those of two rows cannot be compared.

Source: the figures of DINOv2 (arXiv 2304.07193), without its removal of the background.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from iwm_fast import world_model
from iwm_fast.config.evaluation import PcaConfig
from iwm_fast.evals.datasets import clean_images, evenly_spaced, require_readable, validation_shards
from iwm_fast.evals.results import name_with_choices
from iwm_fast.pipelines.errors import printable
from iwm_fast.pipelines.storage.image_folder import find_images
from iwm_fast.pipelines.transforms.normalization import normalize_view
from iwm_fast.rendering.image_grid import Panel, require_writable, save_image_grid
from iwm_fast.runtime.distributed import single_process
from iwm_fast.world_model import WorldModel

# Shares of the patches whose colours are cut off at either end, so that single patches do not dull all others.
_CUT_OFF = 0.01

NamedImage = tuple[str, UInt8[np.ndarray, "H W 3"]]
"""The name of an image file or the key of a sample, and its pixels."""


def draw_pca(config: PcaConfig) -> Path:
    """Draw the maps of a run's features and, as the control, of an untrained encoder; return the picture's file.

    Raises:
        FileNotFoundError, CheckpointError, ShardError: if the run or the images cannot be used.
        ValueError: if an image file cannot be decoded, patches do not divide `size`, the encoder has fewer layers, or
            the picture cannot be written.
        FloatingPointError: if features are not finite.
    """
    path = Path(config.picture or Path(config.run) / "pca.png")
    require_writable(path)
    model = world_model.load(
        config.run, single_process(config.device).device, checkpoint=config.checkpoint, size=config.size
    )
    model.require_layers(config.layers)
    if not config.picture:
        path = path.with_stem(name_with_choices(path.stem, config, model.step))
    images = _image_files(model, config) if config.images else _validation_images(model, config)
    control = world_model.build_untrained(replace(model.config, seed=config.seed), model.device)
    labels, rows = ["image"], [[Panel(pixels=pixels, caption=printable(name)) for name, pixels in images]]
    for name, encoder in ((f"trained, step {model.step}", model), ("untrained encoder", control)):
        maps, shares = principal_maps(_encode(encoder, images, config.layers))
        labels.append(f"{name}: {', '.join(f'{100 * share:.0f}' for share in shares)} % of variance")
        rows.append([Panel(pixels=pixels) for pixels in maps])
    of_layers = f" of the last {config.layers} layers" if config.layers > 1 else ""
    title = (
        f"{Path(config.run).resolve().name}, {model.config.views.size} x {model.config.views.size} pixels: first three "
        f"principal components of the patch features{of_layers} as red, green, blue"
    )
    save_image_grid(path, labels, rows, title)
    return path


def principal_maps(
    tokens: Float[Tensor, "B N D"],
) -> tuple[UInt8[np.ndarray, "B G G 3"], Float[np.ndarray, "3"]]:
    """Return the first three principal components of all patches as colours, and their shares of the variance.

    Each component fills the range of its colour, except for the 1 % of patches at either end. Its sign, which is
    arbitrary, is such that the largest entry of its direction is positive.
    """
    centred = tokens.flatten(0, 1).double()
    centred = centred - centred.mean(dim=0)
    variance, directions = torch.linalg.eigh(centred.T @ centred)
    # In ascending order.
    first = directions[:, -3:].flip(1)
    largest = first.gather(0, first.abs().argmax(dim=0, keepdim=True))
    components = centred @ (first * largest.sign())
    low, high = torch.quantile(components, torch.tensor([_CUT_OFF, 1 - _CUT_OFF]).to(components), dim=0)
    colours = ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    grid = round(tokens.shape[1] ** 0.5)
    pixels = (255 * colours).round().to(torch.uint8).unflatten(0, (len(tokens), grid, grid))
    shares = variance.flip(0)[:3] / variance.sum().clamp(min=1e-12)
    return pixels.cpu().numpy(), shares.cpu().numpy()


def _encode(model: WorldModel, images: list[NamedImage], layers: int) -> Float[Tensor, "B N D"]:
    # One image at a time: there are few, and at a large size they have many patches.
    views = (normalize_view(torch.from_numpy(pixels)[None], model.config.data.normalization) for _, pixels in images)
    tokens = torch.cat([model.encode(view, layers=layers) for view in views])
    if not tokens.isfinite().all():
        problem = f"the encoder of step {model.step} has features that are not finite: its training has diverged"
        raise FloatingPointError(f"{problem}; show an earlier one with checkpoint=STEP")
    return tokens


def _image_files(model: WorldModel, config: PcaConfig) -> list[NamedImage]:
    paths = find_images(Path(config.images))
    chosen = [paths[index] for index in evenly_spaced(len(paths), config.num_images)]
    pixels = model.crop_images(chosen, config.data.max_pixels).numpy()
    return list(zip([path.name for path in chosen], pixels, strict=True))


def _validation_images(model: WorldModel, config: PcaConfig) -> list[NamedImage]:
    shards = validation_shards(model, config.data)
    samples = evenly_spaced(shards.num_samples, config.num_images)
    require_readable((shards, samples))
    return [(shards.key(sample), pixels.cpu().numpy()) for pixels, sample in clean_images(model, shards, samples)]
