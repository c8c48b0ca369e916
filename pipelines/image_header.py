"""What an image file is, read from its header before memory is taken: container, size, orientation, and its decoder.

`probe` decides for checking, training, evaluating, embedding and packing which files are accepted. JPEG, PNG and WebP
are parsed here, because every image passes through `probe` before DALI decodes it. A JPEG takes about 5 microseconds
for its header and 20 for 100 KB of pixels. Pillow reads the headers of BMP, TIFF and PPM.

DALI and Pillow make different pictures of some rare files, or only one of them makes any. DALI decodes the kinds that
it renders like Pillow (`ImageHeader.is_common`). Pillow decodes the others for both loaders: BMP, TIFF, PPM, JPEGs with
four channels, animations, and files whose orientation is stored in an unusual way.
"""

import io
import struct
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import BmpImagePlugin, Image, JpegImagePlugin, PngImagePlugin, PpmImagePlugin, TiffImagePlugin, WebPImagePlugin

from iwm_fast.pipelines.config import IMAGE_FORMATS, MAX_PIXELS
from iwm_fast.pipelines.errors import UndecodableImageError

Encoded = bytes | UInt8[np.ndarray, "_"]
"""The bytes of an image file."""

# Opened by class: Image.open would try every format, and apply Pillow's limit of pixels instead of data.max_pixels.
PLUGINS = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "BMP": BmpImagePlugin.BmpImageFile,
    "TIFF": TiffImagePlugin.TiffImageFile,
    "PPM": PpmImagePlugin.PpmImageFile,
}

_SIGNATURES = {b"BM": "BMP", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"II+\0": "TIFF", b"MM\0+": "TIFF"} | {
    b"P%d" % number: "PPM" for number in range(1, 7)
}
_PNG, _EXIF = b"\x89PNG\r\n\x1a\n", b"Exif\0\0"
# Baseline, extended and progressive, each with Huffman or arithmetic coding.
_ACCEPTED_FRAMES = (0xC0, 0xC1, 0xC2, 0xC9, 0xCA)
_NO_FRAMES = (0xC4, 0xC8, 0xCC)
_PROGRESSIVE_FRAMES = (0xC2, 0xCA)
# Tables, application data and comments: segments with a length, which Pillow skips after the pixels.
_SKIPPED_SEGMENTS = (0xC4, 0xCC, 0xDB, 0xDD, *range(0xE0, 0xF0), 0xFE)
# Whether 0xFF and this byte end the pixels. Escaped bytes, restart markers and fill bytes do not.
_ENDS_PIXELS = np.array([byte not in (0x00, *range(0xD0, 0xD8), 0xFF) for byte in range(256)])
_NO_END_MARKER = "is truncated: the end marker of JPEG is missing"
# First bytes of other containers that people take for accepted ones, so that a message can name them.
_OTHERS = {
    b"GIF8": "GIF", b"\0\0\1\0": "ICO", b"8BPS": "PSD", b"%PDF": "PDF",
    b"\0\0\0\x0cjP": "JPEG 2000", b"\xff\x4f\xff\x51": "JPEG 2000", b"\0\0\0\x0cJXL": "JPEG XL", b"\xff\x0a": "JPEG XL",
}  # fmt: skip


class ImageHeader(NamedTuple):
    """Container, size and orientation of an image file."""

    container: str
    """One of IMAGE_FORMATS."""
    width: int
    """Width of the stored pixels."""
    height: int
    """Height of the stored pixels."""
    orientation: int = 1
    """Orientation as in EXIF, 1 to 8; 1 means upright."""
    is_common: bool = True
    """Whether DALI decodes the file. Otherwise Pillow does, for both loaders."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Width and height of the picture after the orientation is applied."""
        # Orientations 5 to 8 include a quarter turn.
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def probe(encoded: Encoded, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Read the header of an image file, and check that the file is accepted and not cut off.

    Only decoding notices broken pixels, or that a BMP, TIFF or PPM is truncated.

    Raises:
        UndecodableImageError: with the reason, if the file is not an image of an accepted kind, has more than
            `max_pixels` pixels, or is truncated.
    """
    data = view_bytes(encoded)
    start = bytes(data[:16])
    try:
        if start.startswith(b"\xff\xd8\xff"):
            header = _probe_jpeg(data)
        elif start.startswith(_PNG):
            header = _probe_png(data)
        elif start.startswith(b"RIFF") and start[8:12] == b"WEBP":
            header = _probe_webp(data)
        elif container := _SIGNATURES.get(start[:4]) or _SIGNATURES.get(start[:2]):
            header = _probe_with_pillow(data, container)
        else:
            raise UndecodableImageError(_describe_other(start))
    except (IndexError, struct.error):
        raise UndecodableImageError("is truncated: its header is incomplete") from None
    if header.width < 1 or header.height < 1:
        raise UndecodableImageError(f"has {header.width} x {header.height} pixels")
    if header.width * header.height > max_pixels:
        size = f"has {header.width} x {header.height} = {header.width * header.height} pixels"
        raise UndecodableImageError(f"{size}, above data.max_pixels={max_pixels}; resize it, or raise that limit")
    return header


def view_bytes(encoded: Encoded) -> memoryview:
    """Return the bytes of a file without a copy."""
    return memoryview(encoded) if isinstance(encoded, bytes) else encoded.data


def _describe_other(start: bytes) -> str:
    if not start:
        return "has 0 bytes"
    name = next((name for signature, name in _OTHERS.items() if start.startswith(signature)), "")
    if start[4:8] == b"ftyp":
        name = start[8:12].decode("ascii", "replace").strip().upper()
    if name:
        return f"is {name}; accepted formats are {', '.join(IMAGE_FORMATS)}: convert it to one of them"
    return f"is not an image, it begins with {start!r}"


def _probe_jpeg(data: memoryview) -> ImageHeader:
    """Walk through the segments to the first scan, and look for the end marker after it.

    A thumbnail inside EXIF data has an end marker, too; it lies in front of the first scan. Whatever follows the end
    marker, such as a second picture or a movie, is ignored, as by the decoders.
    """
    position, size, exif_segments, is_common, num_channels, is_progressive = 2, None, [], True, 0, False
    while True:
        if data[position] != 0xFF:
            raise UndecodableImageError(f"is a damaged JPEG: its header has no marker at byte {position}")
        marker = data[position + 1]
        if marker == 0xFF:
            # Any number of these may precede a marker.
            position += 1
            continue
        if marker == 0xDA:
            break
        length = data[position + 2] << 8 | data[position + 3]
        if marker == 0xD9 or length < 2:
            raise UndecodableImageError("is a damaged JPEG: its header ends before the pixels")
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAMES:
            bits, height, width, num_channels = struct.unpack_from(">BHHB", data, position + 4)
            if marker not in _ACCEPTED_FRAMES or bits != 8:
                kind = f"{bits} bits per channel" if bits != 8 else "lossless or hierarchical coding"
                raise UndecodableImageError(f"is a JPEG with {kind}; convert it to an ordinary one of 8 bits")
            size, is_progressive = (width, height), marker in _PROGRESSIVE_FRAMES
            is_common &= num_channels in (1, 3)
        elif marker == 0xE1 and data[position + 4 : position + 10] == _EXIF:
            exif_segments.append(bytes(data[position + 10 : position + 2 + length]))
        position += 2 + length
    if size is None:
        raise UndecodableImageError("is a damaged JPEG: its header lacks the size")
    if data[position + 4] == num_channels and not is_progressive:
        _check_pixels(data, position + 2 + (data[position + 2] << 8 | data[position + 3]))
    elif not _has_end_marker(data, position):
        raise UndecodableImageError(_NO_END_MARKER)
    return _with_exif("JPEG", size, exif_segments, is_common)


def _check_pixels(data: memoryview, start: int) -> None:
    """Check that pixels which are stored in one scan end at the end marker.

    DALI stops reading at the last pixel, and fills pixels that are missing with grey. Pillow reads on to the end
    marker, and refuses a file with another image behind half of this one, or with other markers that cannot be there.
    """
    bytes_ = np.frombuffer(data, np.uint8)
    while True:
        after_ff = (bytes_[start:-1] == 0xFF).nonzero()[0] + (start + 1)
        is_end = _ENDS_PIXELS[bytes_[after_ff]]
        if not is_end.any():
            raise UndecodableImageError(_NO_END_MARKER)
        position = int(after_ff[is_end.argmax()])
        marker = data[position]
        if marker == 0xD9:
            return
        if marker not in _SKIPPED_SEGMENTS:
            raise UndecodableImageError(f"is a damaged JPEG: its pixels are interrupted by the marker 0xFF{marker:02X}")
        start = position + 1 + (data[position + 1] << 8 | data[position + 2])


def _has_end_marker(data: memoryview, start: int) -> bool:
    """Search from the end of the file, where the marker is unless something follows the image."""
    end, size = len(data), 64
    while end > start:
        begin = max(start, end - size)
        # One byte more, because the marker has two.
        if bytes(data[begin : end + 1]).rfind(b"\xff\xd9") >= 0:
            return True
        end, size = begin, 1 << 16
    return False


def _with_exif(container: str, size: tuple[int, int], exif: list[bytes], is_common: bool) -> ImageHeader:
    """Return a header with the orientation in the first EXIF data, if there are any."""
    # DALI 2.4 crashes on a JPEG in which a second orientation contradicts the first.
    orientation, is_regular = _exif_orientation(exif[0]) if exif else (1, True)
    return ImageHeader(container, *size, orientation, is_common and is_regular and len(exif) < 2)


def _exif_orientation(exif: bytes) -> tuple[int, bool]:
    """Return the orientation, and whether it is stored as the standard demands, so that all decoders read the same."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1, not exif
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (num_entries,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * num_entries, 12):
            tag, kind, count = struct.unpack_from(order + "HHI", exif, entry)
            if tag == 0x0112:
                # Type 3 is a short integer. Some software writes a long one.
                (value,) = struct.unpack_from(order + ("I" if kind == 4 else "H"), exif, entry + 8)
                return value if 1 <= value <= 8 else 1, kind == 3 and count == 1
    except struct.error:
        return 1, False
    return 1, True


def _probe_png(data: memoryview) -> ImageHeader:
    """Walk through all chunks, so that a cut is noticed wherever it is."""
    position, kinds, exif = len(_PNG), set(), []
    while True:
        length, kind = struct.unpack_from(">I4s", data, position)
        if position + 12 + length > len(data):
            raise UndecodableImageError("is truncated: the end chunk of PNG is missing")
        if kind == b"eXIf":
            exif.append(bytes(data[position + 8 : position + 8 + length]))
        kinds.add(kind)
        if kind == b"IEND":
            break
        position += 12 + length
    width, height, _, colour_type = struct.unpack_from(">IIBB", data, 16)
    missing = {b"IHDR", b"IDAT", *([b"PLTE"] if colour_type == 3 else [])} - kinds
    if missing:
        raise UndecodableImageError(f"is a damaged PNG: it lacks {b', '.join(sorted(missing)).decode()}")
    # Decoders differ in which picture of an animation they show.
    return _with_exif("PNG", (width, height), exif, is_common=b"acTL" not in kinds)


def _probe_webp(data: memoryview) -> ImageHeader:
    # RIFF stores the size of what follows the first 8 bytes.
    end = int.from_bytes(data[4:8], "little") + 8
    if len(data) < end:
        raise UndecodableImageError(f"is truncated: WebP announces {end} bytes, it has {len(data)}")
    kind, first = bytes(data[12:16]), data[20:30]
    # If pixels are damaged, DALI reads past the announced size; Pillow does not.
    is_common = len(data) == end
    if kind == b"VP8 ":
        # 14 bits each; the upper two ask for scaling, which decoders leave to the viewer.
        width, height = (value & 0x3FFF for value in struct.unpack_from("<HH", data, 26))
        return ImageHeader("WEBP", width, height, is_common=is_common)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ImageHeader("WEBP", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1, is_common=is_common)
    if kind != b"VP8X":
        raise UndecodableImageError(f"is a damaged WebP: it begins with the chunk {kind!r}")
    width, height = (int.from_bytes(first[begin : begin + 3], "little") + 1 for begin in (4, 7))
    position, exif = 12, []
    while position + 8 <= end:
        kind, length = struct.unpack_from("<4sI", data, position)
        if kind == b"EXIF":
            exif.append(bytes(data[position + 8 : position + 8 + length]).removeprefix(_EXIF))
        # Chunks begin at even positions.
        position += 8 + length + length % 2
    is_animated = bool(first[0] & 0x02)
    return _with_exif("WEBP", (width, height), exif, is_common and not is_animated)


def _probe_with_pillow(data: memoryview, container: str) -> ImageHeader:
    try:
        with PLUGINS[container](io.BytesIO(data)) as image:
            return _header_of(image, container)
    except (UndecodableImageError, MemoryError):
        raise
    # Pillow passes on what its parsers raise: OSError, SyntaxError, ValueError, struct.error, ...
    except Exception as error:
        raise UndecodableImageError(f"is a {container} that cannot be read: {error or type(error).__name__}") from error


def _header_of(image: Image.Image, container: str) -> ImageHeader:
    (width, height), orientation, sample_formats = image.size, 1, (1,)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        tags = image.tag_v2
        # `image.size` is that of the upright picture in some versions of Pillow.
        width, height = tags[TiffImagePlugin.IMAGEWIDTH], tags[TiffImagePlugin.IMAGELENGTH]
        # Pillow turns a TIFF also by an orientation in its XMP data (tag 700), which takes a further parsing to find.
        stored = image.getexif().get(0x0112, 1) if 700 in tags else tags.get(0x0112, 1)
        orientation = stored if isinstance(stored, int) and 1 <= stored <= 8 else 1
        sample_formats = tags.get(TiffImagePlugin.SAMPLEFORMAT, (1,))
    is_wide = image.mode == "F" or (container == "TIFF" and image.mode == "I")
    if is_wide or set(sample_formats) != {1}:
        raise UndecodableImageError(
            f"is a {container} of floating-point, signed or 32-bit numbers, which have no common range of brightness; "
            "convert it to 8 or 16 bits per channel"
        )
    return ImageHeader(container, width, height, orientation, is_common=False)
