"""The header tells what an image file is, and that it is truncated, without decoding anything."""

import numpy as np
import pytest

from fixtures.image_matrix import HEIGHT, WIDTH, all_files, base_pixels
from fixtures.tar_files import encode
from iwm_fast.pipelines.errors import UndecodableImageError
from iwm_fast.pipelines.image_header import ImageHeader, probe

JPEG = encode(base_pixels())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_container_and_size_are_read_from_bytes_and_arrays(kind):
    content = encode(base_pixels(), kind)
    expected = ImageHeader(kind, WIDTH, HEIGHT, 1, kind in ("JPEG", "PNG", "WEBP"))
    assert probe(content) == probe(np.frombuffer(content, np.uint8)) == expected


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_file_that_is_cut_anywhere_is_refused(kind):
    content = encode(base_pixels(), kind)
    for length in range(len(content)):
        with pytest.raises(UndecodableImageError):
            probe(content[:length])


# A camera's padding, a vendor's data, a movie, another picture, and long ones of which only the last part is searched.
TRAILERS = {
    "a line break": b"\n",
    "padding": bytes(200),
    "text": b"trailer" * 30,
    "a movie": b"\0\0\0\x18ftypmp42" + bytes(100_000),
    "a picture": JPEG,
    "noise": np.random.default_rng(0).integers(0, 256, 100_000, np.uint8).tobytes(),
}


@pytest.mark.parametrize("name", TRAILERS)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_whatever_follows_the_image_does_not_make_it_look_truncated(kind, name):
    header = probe(encode(base_pixels(), kind) + TRAILERS[name])
    # DALI reads beyond the end of a damaged WebP, so that Pillow decodes a WebP that something follows.
    assert header == ImageHeader(kind, WIDTH, HEIGHT, is_common=kind != "WEBP")


@pytest.mark.parametrize("length", [*range(60, 67), *range((1 << 16) + 60, (1 << 16) + 67)])
def test_the_end_marker_is_found_wherever_the_blocks_of_the_search_begin(length):
    assert probe(JPEG + bytes(length)).width == WIDTH
    with pytest.raises(UndecodableImageError, match="is truncated"):
        probe(JPEG[:-2] + bytes(length))


def test_the_end_marker_of_a_thumbnail_does_not_count():
    complete = all_files("jpeg")["jpeg: exif thumbnail"]
    assert complete.count(b"\xff\xd9") == 2 and probe(complete).orientation == 6
    with pytest.raises(UndecodableImageError, match="is truncated: the end marker of JPEG is missing"):
        probe(complete[:-2])


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_the_limit_of_pixels_holds_for_every_container(kind):
    content, num_pixels = encode(base_pixels(), kind), WIDTH * HEIGHT
    assert probe(content, num_pixels).width == WIDTH
    with pytest.raises(
        UndecodableImageError, match=f"has {WIDTH} x {HEIGHT} = {num_pixels} pixels, above data.max_pix"
    ):
        probe(content, num_pixels - 1)


@pytest.mark.parametrize(
    ("start", "name"),
    [(b"GIF89a", "GIF"), (b"\0\0\0\x1cftypavif", "AVIF"), (b"\0\0\0\x18ftypheic", "HEIC"), (b"8BPS\0\1", "PSD"),
     (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"), (b"%PDF-1.7", "PDF")],
)  # fmt: skip
def test_other_containers_are_named_with_the_accepted_ones(start, name):
    with pytest.raises(UndecodableImageError, match=f"is {name}; accepted formats are JPEG, PNG, .*: convert it"):
        probe(start + bytes(100))
