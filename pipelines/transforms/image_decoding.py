"""Decodes image files with Pillow, and prepares them for DALI."""

import io
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps
from torch import Tensor

from iwm_fast.pipelines.config import MAX_PIXELS
from iwm_fast.pipelines.errors import UndecodableImageError
from iwm_fast.pipelines.image_header import PLUGINS, Encoded, ImageHeader, probe, view_bytes

# Pillow warns above this number of pixels, and raises an error above twice as many.
_PILLOW_WARNS_ABOVE = 89_478_485
_limit_lock = Lock()

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode_image(encoded: Encoded, max_pixels: int = MAX_PIXELS) -> UInt8[Tensor, "H W 3"]:
    """Decode an image to RGB and turn it upright.

    Raises:
        UndecodableImageError: with the reason, if `probe` refuses the file or its pixels cannot be decoded.
    """
    return _decode(encoded, probe(encoded, max_pixels))


def _decode(encoded: Encoded, header: ImageHeader) -> UInt8[Tensor, "H W 3"]:
    content = _pixels_of_png(view_bytes(encoded)) if header.container == "PNG" else bytes(encoded)
    opener = PLUGINS[header.container]
    with naming_undecodable(header), pillow_limit_lifted(header), opener(io.BytesIO(content)) as image:
        if header.container == "TIFF":
            # Pillow turns a TIFF while it loads it; this would turn it only if it had not.
            return upright_rgb(image)
        turn = TURNS.get(header.orientation)
        return _rgb(image if turn is None else image.transpose(turn))


@contextmanager
def naming_undecodable(header: ImageHeader) -> Iterator[None]:
    """Turn what a decoder raises for broken pixels into `UndecodableImageError`."""
    try:
        yield
    except MemoryError:
        raise
    # Pillow passes on what its decoders raise: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        reason = f"is a {header.container} that cannot be decoded: {error or type(error).__name__}"
        raise UndecodableImageError(reason) from error


def upright_rgb(image: Image.Image) -> UInt8[Tensor, "H W 3"]:
    """Return the pixels of a Pillow image as RGB, turned by the orientation in its EXIF data."""
    return _rgb(ImageOps.exif_transpose(image))


def _rgb(image: Image.Image) -> UInt8[Tensor, "H W 3"]:
    if image.mode.startswith("I"):
        # Pillow's `convert` clips 16-bit values at 255 instead of scaling them by 255 / 65535.
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    return torch.from_numpy(np.array(image.convert("RGB")))


class DaliInput(NamedTuple):
    """What DALI is given to decode."""

    encoded: UInt8[np.ndarray, "_"]
    """The bytes of an image file."""
    shape: tuple[int, int]
    """Height and width of the upright picture."""


def dali_input(encoded: UInt8[np.ndarray, "_"], max_pixels: int = MAX_PIXELS) -> DaliInput:
    """Return what DALI is given to decode: the file itself, or for an uncommon one what Pillow makes of it.

    Raises:
        UndecodableImageError: with the reason, if `probe` refuses the file or Pillow cannot decode an uncommon one.
    """
    header = probe(encoded, max_pixels)
    if not header.is_common:
        return as_ppm(_decode(encoded, header))
    width, height = header.upright_size
    return DaliInput(encoded, (height, width))


def as_ppm(pixels: UInt8[Tensor, "H W 3"]) -> DaliInput:
    """Return pixels as a PPM file, which DALI decodes without a loss."""
    height, width, _ = pixels.shape
    encoded = np.frombuffer(b"P6 %d %d 255\n" % (width, height) + pixels.numpy().tobytes(), np.uint8)
    return DaliInput(encoded, (height, width))


def _pixels_of_png(data: memoryview) -> bytes:
    """Return a PNG with only those chunks that its colours depend on.

    Pillow refuses some pictures whose metadata are damaged or large. DALI ignores metadata.
    """
    position, chunks = 8, [bytes(data[:8])]
    while position < len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND"):
            chunks.append(bytes(data[position : position + 12 + length]))
        if kind == b"IEND":
            break
        position += 12 + length
    return b"".join(chunks)


@contextmanager
def pillow_limit_lifted(header: ImageHeader) -> Iterator[None]:
    """Lift Pillow's limit of pixels for a large image that `probe` has accepted; data.max_pixels replaces it."""
    if header.width * header.height <= _PILLOW_WARNS_ABOVE:
        yield
        return
    # The limit is a variable of Pillow's module. Large images wait for each other, so that it is restored.
    with _limit_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit
