"""The pixel decoder of a run, where there is one: what do predicted tokens look like?"""

import logging

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from iwm_fast.checkpoints.pixel_decoder import load_pixel_decoder
from iwm_fast.models.pixel_decoder import PixelDecoder
from iwm_fast.world_model import WorldModel

log = logging.getLogger(__name__)


def find_decoder(run: str, model: WorldModel) -> PixelDecoder | None:
    """Return the decoder of the model's checkpoint, or None, with a warning, if there is none for its image size.

    Raises:
        CheckpointError: if it is damaged.
    """
    try:
        decoder = load_pixel_decoder(run, model.step, model.device)
    except FileNotFoundError:
        log.warning("no decoder of this checkpoint, so no imagined pictures: `iwm decode run=%s` trains one", run)
        return None
    if decoder.spec.grid != model.config.grid:
        log.warning("the decoder of %s was trained at another image size, so there are no imagined pictures", run)
        return None
    return decoder


def decode_pixels(decoder: PixelDecoder, tokens: Float[Tensor, "B ND"]) -> UInt8[np.ndarray, "B H W 3"]:
    """Return the pixels of images from their flattened tokens."""
    colours = decoder.decode(tokens.unflatten(1, (decoder.spec.grid**2, decoder.spec.token_dim)))
    return (colours * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
