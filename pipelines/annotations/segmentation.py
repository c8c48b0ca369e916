"""Segmentation maps of samples: decoded to class indices, and cropped like the views of a batch."""

import hashlib
import io
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import numpy as np
from jaxtyping import Bool, Float32, UInt8

from iwm_fast.pipelines.config import MAX_PIXELS
from iwm_fast.pipelines.errors import ShardError, UndecodableImageError
from iwm_fast.pipelines.image_header import PLUGINS, probe
from iwm_fast.pipelines.storage.reader import FileCache
from iwm_fast.pipelines.storage.shard import require_unchanged
from iwm_fast.pipelines.storage.shard_set import ShardSet
from iwm_fast.pipelines.transforms.image_decoding import pillow_limit_lifted

_REMEDY = "add it as .seg.png, or as .png next to a .jpg"
_COLOUR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey and alpha", 6: "RGBA"}
# (colour type, bit depth) for which Pillow returns the stored numbers. It rescales grey of fewer than 8 bits.
_ACCEPTED = {(3, 1), (3, 2), (3, 4), (3, 8), (0, 8)}


Value = TypeVar("Value")


class NoMaskError(ValueError):
    """A valid image whose pixels are not class indices."""


def read_mask(shards: ShardSet, files: FileCache, sample: int) -> UInt8[np.ndarray, "H W"]:
    """Read a sample's segmentation map: the stored class indices, in the size of the image turned upright.

    Raises:
        ShardError: if the map is missing, cannot be decoded, does not hold class indices or differs from its image in
            size, or if the shard has changed since it was indexed.
        OSError: if the shard cannot be read.
    """
    shard, position = shards.locate_one(sample)
    address = shards.shard_and_key(sample)
    if not shard.mask_offset[position]:
        raise ShardError("has no segmentation map", **address, remedy=_REMEDY)
    image_begin, mask_begin = int(shard.image_offset[position]), int(shard.mask_offset[position])
    image_end, mask_end = image_begin + int(shard.image_size[position]), mask_begin + int(shard.mask_size[position])
    begin, end = min(image_begin, mask_begin), max(image_end, mask_end)
    # The members of a sample lie next to each other, so that a single read returns the map and the image's header.
    with files.lease(shard.path) as file:
        require_unchanged(shard, file)
        content = file.read_at(begin, end - begin)
    try:
        mask = decode_mask(content[mask_begin - begin : mask_end - begin], shards.max_pixels)
    # Pillow passes on what its decoders raise: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        problem = f"segmentation map cannot be used: {error or type(error).__name__}"
        raise ShardError(problem, **address, remedy="replace or remove the member") from error
    try:
        image_size = probe(content[image_begin - begin : image_end - begin], shards.max_pixels).upright_size
    except UndecodableImageError as error:
        raise ShardError(f"image {error}", **address, remedy="run `iwm shards check` to leave it out") from error
    if mask.shape[::-1] != image_size:
        raise ShardError(describe_sizes(mask, image_size), **address, remedy="write both in the same size")
    return mask


def require_masks(shards: ShardSet) -> None:
    """Check that every sample has a segmentation map, without reading the maps.

    Raises:
        ShardError: naming the first sample without one.
    """
    for shard in shards.shards:
        missing = np.flatnonzero(shard.mask_offset == 0)
        if len(missing):
            problem = f"has no segmentation map ({len(missing)} of {len(shard.keys)} samples of this shard lack one)"
            raise ShardError(problem, shard=shard.path, key=shard.keys[int(missing[0])], remedy=_REMEDY)


def read_mask_values(shards: ShardSet, num_threads: int = 8) -> Bool[np.ndarray, "samples 256"]:
    """Read all segmentation maps and return which class indices each one holds.

    A map of half a megapixel takes about 2 ms.

    Args:
        shards: the samples.
        num_threads: number of maps that are read and decoded at a time.

    Raises:
        ShardError: if a map is missing, cannot be decoded, does not hold class indices or differs from its image in
            size, or if a shard has changed since it was indexed.
        OSError: if a shard cannot be read.
    """

    def has_value(files: FileCache, sample: int) -> Bool[np.ndarray, "256"]:
        return np.bincount(read_mask(shards, files, sample).ravel(), minlength=256) > 0

    return np.stack(_of_all_samples(has_value, shards, num_threads))


def masks_digest(shards: ShardSet, num_threads: int = 8) -> str:
    """Return a SHA-256 of the encoded segmentation maps of all samples, which have to be read but not decoded for it.

    Raises:
        ShardError: if a shard has changed since it was indexed.
        OSError: if a shard cannot be read.
    """

    def digest(files: FileCache, sample: int) -> bytes:
        shard, position = shards.locate_one(sample)
        with files.lease(shard.path) as file:
            require_unchanged(shard, file)
            content = file.read_at(int(shard.mask_offset[position]), int(shard.mask_size[position]))
        return hashlib.sha256(content).digest()

    return hashlib.sha256(b"".join(_of_all_samples(digest, shards, num_threads))).hexdigest()


def _of_all_samples(measure: Callable[[FileCache, int], Value], shards: ShardSet, num_threads: int) -> list[Value]:
    """Return what a function of the open files and the number of a sample returns for each sample, by threads."""
    files, pool = FileCache(), ThreadPoolExecutor(num_threads, thread_name_prefix="masks")
    try:
        return list(pool.map(partial(measure, files), range(shards.num_samples)))
    finally:
        # After an error the remaining maps are cancelled instead of being read first.
        pool.shutdown(cancel_futures=True)
        files.close()


def decode_mask(encoded: bytes, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "H W"]:
    """Decode a PNG with a palette or 8-bit grey to the stored numbers.

    Raises:
        NoMaskError: if it is an image of another kind.
        UndecodableImageError: if it is not an image, larger than `max_pixels`, or cut off.
        OSError, SyntaxError, ...: from Pillow, if its pixels are broken.
    """
    header = probe(encoded, max_pixels)
    # Bytes 24 and 25 of a PNG are bit depth and colour type. Pillow's mode is "L" for grey of 2, 4 and 8 bits.
    kind = (encoded[25], encoded[24]) if header.container == "PNG" else None
    if kind not in _ACCEPTED:
        actual = f"PNG with {_COLOUR_TYPES.get(kind[0])} of {kind[1]} bits" if kind else header.container
        raise NoMaskError(f"{actual} holds no class indices; accepted are PNGs with a palette or 8-bit grey")
    with pillow_limit_lifted(header), PLUGINS["PNG"](io.BytesIO(encoded)) as image:
        return np.array(image)


def decode_mask_of_size(
    encoded: bytes, image_size: tuple[int, int], max_pixels: int = MAX_PIXELS
) -> UInt8[np.ndarray, "H W"]:
    """Decode the segmentation map of an image whose width and height, turned upright, are given.

    Raises:
        NoMaskError: if it is an image of another kind, which does not make the sample bad.
        UndecodableImageError: with the reason, if it cannot be decoded or has another size than its image.
    """
    try:
        mask = decode_mask(encoded, max_pixels)
    except NoMaskError:
        raise
    # Pillow passes on what its decoders raise: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        reason = f"segmentation map cannot be decoded: {error or type(error).__name__}"
        raise UndecodableImageError(reason) from error
    if mask.shape[::-1] != image_size:
        raise UndecodableImageError(describe_sizes(mask, image_size))
    return mask


def describe_sizes(mask: UInt8[np.ndarray, "H W"], image_size: tuple[int, int]) -> str:
    """Return the sizes of a map and its image, for the error that they differ."""
    mask_size = f"{mask.shape[1]} x {mask.shape[0]}"
    return f"segmentation map is {mask_size}, its image (turned upright) is {image_size[0]} x {image_size[1]}"


def crop_mask(
    mask: UInt8[np.ndarray, "H W"], window: Float32[np.ndarray, "4"], flip: bool, size: int
) -> UInt8[np.ndarray, "S S"]:
    """Crop and resize a segmentation map like its image, with nearest-neighbour instead of antialiased resampling.

    Each index is taken at the centre of a pixel of the view, which is also the centre of the antialiasing filter.

    Args:
        mask: class indices, from `read_mask`.
        window: top, left, height and width in pixels, a row of `Batch.crop_window`.
        flip: whether the view is mirrored.
        size: side of the view in pixels.

    Raises:
        ValueError: if the window is not inside the map.
    """
    top, left, height, width = (int(value) for value in window)
    is_inside = min(top, left) >= 0 and min(height, width) >= 1
    is_inside = is_inside and top + height <= mask.shape[0] and left + width <= mask.shape[1]
    if not is_inside:
        raise ValueError(f"window must be inside the mask of height and width {mask.shape}, got {window.tolist()}")
    rows, columns = (_nearest(extent, size) for extent in (height, width))
    crop = mask[top + rows[:, None], left + columns]
    return np.ascontiguousarray(crop[:, ::-1] if flip else crop)


def _nearest(extent: int, size: int) -> np.ndarray:
    # floor((i + 1/2) * extent / size) in integers, which are exact where floating point could round to the next pixel.
    return (2 * np.arange(size) + 1) * extent // (2 * size)
