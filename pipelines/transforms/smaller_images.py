"""Writes images and segmentation maps again in a smaller size.

A view is drawn from the smaller file as it is from the original one, within the loss of JPEG: the picture is turned
upright and has the colours that the loaders give it. Metadata such as EXIF data and colour profiles, which the loaders
do not use otherwise, are left out.
"""

import io

import numpy as np
from PIL import Image

from iwm_fast.pipelines.image_header import PLUGINS, ImageHeader
from iwm_fast.pipelines.transforms.image_decoding import TURNS, decode_image, naming_undecodable, pillow_limit_lifted

# A JPEG can be decoded at 1/2, 1/4 or 1/8 of its size, by a coarse filter. With twice the pixels that are needed, the
# result is within 0.5 dB of that from all pixels, in half the time.
_MARGIN = 2
# The longest side that libjpeg accepts.
_LONGEST = 65500


def smaller_size(size: tuple[int, int], shorter: int) -> tuple[int, int] | None:
    """Return width and height whose shorter side has `shorter` pixels; None for an image that has no more than that, or
    would be too long for a JPEG.
    """
    width, height = (round(side * shorter / min(size)) for side in size)
    return (width, height) if min(size) > shorter and max(width, height) <= _LONGEST else None


def shrink_if_larger(encoded: bytes, header: ImageHeader, shorter: int, quality: int) -> bytes | None:
    """Decode an image; return it as a JPEG whose shorter side has `shorter` pixels, None if it is to stay as it is.

    It stays if it is no larger, or if it has such a low quality that the JPEG would have no fewer bytes.

    Raises:
        UndecodableImageError: with the reason, if its pixels cannot be decoded.
    """
    size = smaller_size(header.upright_size, shorter)
    if size is None:
        decode_image(encoded, header.width * header.height)
        return None
    smaller = shrink_image(encoded, header, size, quality)
    return smaller if len(smaller) < len(encoded) else None


def shrink_image(encoded: bytes, header: ImageHeader, size: tuple[int, int], quality: int) -> bytes:
    """Return an image as an upright JPEG of this width and height, reduced with antialiasing.

    Raises:
        UndecodableImageError: with the reason, if its pixels cannot be decoded.
    """
    if header.container == "JPEG":
        image = _reduced_jpeg(encoded, header, size)
    else:
        pixels = decode_image(encoded, header.width * header.height)
        image = Image.fromarray(pixels.numpy()).resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    if (pixels == pixels[..., :1]).all():
        # Files without colours are smaller with a single channel.
        image = image.getchannel(0)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=quality, optimize=True)
    return content.getvalue()


def _reduced_jpeg(encoded: bytes, header: ImageHeader, size: tuple[int, int]) -> Image.Image:
    """Return an upright RGB image in this size; no more of its resolution is decoded than is needed."""
    turn = TURNS.get(header.orientation)
    stored_size = size[::-1] if header.orientation >= 5 else size
    with naming_undecodable(header), pillow_limit_lifted(header), PLUGINS["JPEG"](io.BytesIO(encoded)) as image:
        reduced = image.draft(None, (_MARGIN * stored_size[0], _MARGIN * stored_size[1]))
        # The last column and row of a reduced image may stand for less than a pixel, which the box takes into account.
        box = reduced[1] if reduced else None
        resized = image.convert("RGB").resize(stored_size, Image.Resampling.BICUBIC, box)
    return resized if turn is None else resized.transpose(turn)


def shrink_mask(encoded: bytes, size: tuple[int, int]) -> bytes:
    """Return a segmentation map, a PNG that can be decoded, in this width and height: each pixel has the nearest one's
    class index.
    """
    content = io.BytesIO()
    with PLUGINS["PNG"](io.BytesIO(encoded)) as mask:
        mask.resize(size, Image.Resampling.NEAREST).save(content, "PNG")
    return content.getvalue()
