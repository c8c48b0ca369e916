"""Segmentation maps of samples: decoded to class indices, and cut to the window that a batch shows."""

import io
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from jaxtyping import Bool, Float32, UInt8
from PIL import ExifTags, Image

from iwm_fast.pipelines.config import check
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.reader import FileCache
from iwm_fast.pipelines.storage.shard import require_unchanged
from iwm_fast.pipelines.storage.shard_set import ShardSet

_REMEDY = "add it as .seg.png, or as .png beside a .jpg"
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_COLOUR_TYPES = {0: "grey", 2: "RGB", 3: "palette", 4: "grey and alpha", 6: "RGBA"}
# (colour type, bits) whose stored numbers Pillow hands out as they are; it stretches grey of fewer bits
_ACCEPTED = {(3, 1), (3, 2), (3, 4), (3, 8), (0, 8)}


class NoMaskError(ValueError):
    """An image that is whole, but whose pixels are no class indices."""


def read_mask(shards: ShardSet, files: FileCache, sample: int) -> UInt8[np.ndarray, "H W"]:
    """Read a sample's segmentation map: class indices as stored, of the size of the image turned upright.

    Raises:
        ShardError: if there is none, it cannot be decoded, is no mask, or differs from its image in size; also if the
            shard has changed since it was indexed.
    """
    shard, position = shards.shard_of(sample)
    where = shards.where(sample)
    if not shard.mask_offset[position]:
        raise ShardError("has no segmentation map", **where, remedy=_REMEDY)
    image_begin, mask_begin = int(shard.image_offset[position]), int(shard.mask_offset[position])
    image_end, mask_end = image_begin + int(shard.image_size[position]), mask_begin + int(shard.mask_size[position])
    begin, end = min(image_begin, mask_begin), max(image_end, mask_end)
    # the members of a sample are neighbours: one read, and the image's header costs nothing more
    with files.lease(shard.path) as file:
        require_unchanged(shard, file)
        content = file.read_at(begin, end - begin)
    try:
        mask = decode_mask(content[mask_begin - begin : mask_end - begin])
        image_size = upright_size(content[image_begin - begin : image_end - begin])
    # Pillow raises whatever its decoders do: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        what = f"segmentation map cannot be used: {error or type(error).__name__}"
        raise ShardError(what, **where, remedy="replace the member or leave it out") from error
    if mask.shape[::-1] != image_size:
        raise ShardError(size_difference(mask, image_size), **where, remedy="write both in the same size")
    return mask


def require_masks(shards: ShardSet) -> None:
    """Check that every sample has a segmentation map, without reading any.

    Raises:
        ShardError: naming the first sample without one.
    """
    for shard in shards.shards:
        missing = np.flatnonzero(shard.mask_offset == 0)
        if len(missing):
            what = f"has no segmentation map, like {len(missing)} of {len(shard.keys)} samples of this shard"
            raise ShardError(what, shard=shard.path, key=shard.keys[int(missing[0])], remedy=_REMEDY)


def read_mask_values(shards: ShardSet, num_threads: int = 8) -> Bool[np.ndarray, "samples 256"]:
    """Read every sample's map and return which values it holds: about 2 ms each for maps of half a megapixel.

    Args:
        shards: the samples.
        num_threads: maps read and decoded at once.

    Raises:
        ShardError: as `read_mask`.
    """
    found, files = np.zeros((shards.num_samples, 256), bool), FileCache()

    def note(sample: int) -> None:
        found[sample] = np.bincount(read_mask(shards, files, sample).ravel(), minlength=256) > 0

    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="masks")
    try:
        for _ in pool.map(note, range(shards.num_samples)):
            pass
    finally:
        # one that cannot be read ends it: the others need not be waited for
        pool.shutdown(cancel_futures=True)
        files.close()
    return found


def decode_mask(encoded: bytes) -> UInt8[np.ndarray, "H W"]:
    """Decode a palette or 8-bit grey PNG to the numbers it stores.

    Raises:
        NoMaskError: if it is an image of another kind.
        OSError, SyntaxError, ...: as Pillow, if it is no whole image.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        kind = (encoded[25], encoded[24]) if encoded.startswith(_SIGNATURE) else None
        if kind not in _ACCEPTED:
            found = f"PNG with {_COLOUR_TYPES.get(kind[0])} of {kind[1]} bits" if kind else f"{image.format}"
            raise NoMaskError(f"{found} holds no class indices; accepted are PNGs with palette or 8-bit grey")
        return np.array(image)


def upright_size(encoded: bytes) -> tuple[int, int]:
    """Return width and height of an image as it is rendered, turned as its EXIF tag says, from its header.

    Raises:
        OSError, SyntaxError, ...: as Pillow, if it is no image.
    """
    with Image.open(io.BytesIO(encoded)) as image:
        width, height = image.size
        # orientations 5 to 8 are quarter turns
        return (height, width) if image.getexif().get(ExifTags.Base.Orientation, 1) >= 5 else (width, height)


def size_difference(mask: UInt8[np.ndarray, "H W"], image_size: tuple[int, int]) -> str:
    """Say how mask and image differ."""
    sides = f"{mask.shape[1]} x {mask.shape[0]}"
    return f"segmentation map is {sides}, its image (turned upright) {image_size[0]} x {image_size[1]}"


def crop_mask(
    mask: UInt8[np.ndarray, "H W"], window: Float32[np.ndarray, "4"], flip: bool, size: int
) -> UInt8[np.ndarray, "S S"]:
    """Cut a window out of a mask as it is cut out of the image, nearest neighbour instead of antialiased.

    Each index is taken at the centre of the view's pixel, where the antialiased resize has its middle too.

    Args:
        mask: as `read_mask` gives it.
        window: top, left, height, width in pixels, a row of `Batch.crop_window`.
        flip: whether the view is mirrored.
        size: side of the view in pixels.

    Raises:
        ValueError: if the window reaches beyond the mask.
    """
    top, left, height, width = (int(value) for value in window)
    is_inside = min(top, left) >= 0 and min(height, width) >= 1
    is_inside = is_inside and top + height <= mask.shape[0] and left + width <= mask.shape[1]
    check(is_inside, "window", window.tolist(), f"lie inside a mask of height, width {mask.shape}")
    rows, columns = (_nearest(extent, size) for extent in (height, width))
    cut = mask[top + rows[:, None], left + columns]
    return np.ascontiguousarray(cut[:, ::-1] if flip else cut)


def _nearest(extent: int, size: int) -> np.ndarray:
    # floor((i + 1/2) * extent / size), in integers
    return (2 * np.arange(size) + 1) * extent // (2 * size)
