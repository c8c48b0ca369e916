"""Segmentation maps: the stored indices, from the right member, cropped like the image."""

import io
import os

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data

from fixtures.tar_files import encode, photograph, write_tar
from iwm_fast.pipelines.annotations.segmentation import (
    crop_mask,
    masks_digest,
    read_mask,
    read_mask_values,
    require_masks,
)
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.reader import FileCache
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.image_decoding import decode_image
from iwm_fast.pipelines.transforms.torch_renderer import resized_crop


def png(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def indices() -> np.ndarray:
    """Return a map of 50 x 70 pixels with five brightness classes of a photograph, and 255 for unlabelled pixels."""
    gray = data.camera()[100:150, 150:220]
    classes = (gray // 52).astype(np.uint8)
    classes[:3] = 255
    return classes


def palette_png(indices: np.ndarray, **options) -> bytes:
    image = Image.frombytes("P", indices.shape[::-1], indices.tobytes())
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, np.uint8).tobytes())
    return png(image, **options)


def gray_png(indices: np.ndarray) -> bytes:
    return png(Image.fromarray(indices))


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return photograph("coffee.png")[100:150, 150:220]


def read(tmp_path, members: list[tuple[str, bytes]], sample: int = 0) -> np.ndarray:
    write_tar(tmp_path / "s.tar", members)
    files = FileCache()
    try:
        return read_mask(open_shards(str(tmp_path / "s.tar")), files, sample)
    finally:
        files.close()


def test_palette_and_grey_maps_return_the_stored_indices(tmp_path, indices, pixels):
    binary = indices % 2
    encoded = {
        "palette": (palette_png(indices), indices),
        "transparent": (palette_png(indices, transparency=255), indices),
        "grey": (gray_png(indices), indices),
        "one bit": (palette_png(binary, bits=1), binary),
        "two bits": (palette_png(binary + 2, bits=2), binary + 2),
        "four bits": (palette_png(binary + 9, bits=4), binary + 9),
    }
    members = []
    for key, (mask, _) in encoded.items():
        members += [(f"{key}.jpg", encode(pixels)), (f"{key}.seg.png", mask)]
    for sample, (_, expected) in enumerate(encoded.values()):
        mask = read(tmp_path, members, sample)
        assert mask.dtype == np.uint8 and np.array_equal(mask, expected)


@pytest.mark.parametrize(
    "extensions",
    [
        ["jpg", "seg.png"],
        ["seg.png", "jpg"],
        ["png", "jpg"],
        ["seg.png", "json", "webp"],
        ["webp", "png"],
        ["JPEG", "cls", "PNG"],
    ],
)
def test_the_map_is_found_in_any_order_of_members(tmp_path, indices, pixels, extensions):
    contents = {"json": b"{}", "cls": b"3"}
    contents |= {"jpg": encode(pixels), "JPEG": encode(pixels), "webp": encode(pixels, "WEBP")}
    members = [(f"a.{extension}", contents.get(extension, palette_png(indices))) for extension in extensions]
    assert np.array_equal(read(tmp_path, members), indices)


def test_a_png_alone_is_the_image(tmp_path, pixels):
    with pytest.raises(ShardError, match=r"has no segmentation map; add it as \.seg\.png"):
        read(tmp_path, [("a.png", encode(pixels, "PNG"))])


def test_a_seg_png_is_preferred_to_a_png(tmp_path, indices, pixels):
    members = [("a.jpg", encode(pixels)), ("a.png", encode(pixels, "PNG")), ("a.seg.png", gray_png(indices))]
    assert np.array_equal(read(tmp_path, members), indices)


def test_maps_have_the_size_of_the_image_turned_upright(tmp_path, indices):
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    rotated = np.ascontiguousarray(np.rot90(photograph("coffee.png")[100:150, 150:220]))
    Image.fromarray(rotated).save(file, "JPEG", exif=exif)
    assert decode_image(np.frombuffer(file.getvalue(), np.uint8)).shape == (50, 70, 3)
    assert np.array_equal(read(tmp_path, [("a.jpg", file.getvalue()), ("a.seg.png", gray_png(indices))]), indices)
    with pytest.raises(ShardError, match=r"map is 50 x 70, its image \(turned upright\) is 70 x 50"):
        read(tmp_path, [("a.jpg", file.getvalue()), ("a.seg.png", gray_png(np.ascontiguousarray(indices.T)))])


def unusable_mask(kind: str, indices: np.ndarray, pixels: np.ndarray) -> bytes:
    """Return a file that is not a valid map of the image."""
    return {
        "colours": lambda: encode(pixels, "PNG"),
        "alpha": lambda: png(Image.fromarray(pixels).convert("RGBA")),
        "deep grey": lambda: png(Image.fromarray(indices.astype(np.uint16))),
        "shallow grey": lambda: png(Image.fromarray(indices > 2)),
        "jpeg": lambda: encode(pixels),
        "cut": lambda: palette_png(indices)[:-200],
        "empty": lambda: b"",
        "page": lambda: b"<html>not found</html>",
        "header": lambda: palette_png(indices)[:24],
        "too small": lambda: palette_png(np.ascontiguousarray(indices[:-1])),
    }[kind]()


UNUSABLE = {
    "colours": "PNG with RGB of 8 bits holds no class indices; accepted are PNGs with a palette or 8-bit grey",
    "alpha": "PNG with RGBA of 8 bits",
    "deep grey": "PNG with grey of 16 bits",
    "shallow grey": "PNG with grey of 1 bits",
    "jpeg": "JPEG holds no class indices",
    "cut": "cannot be used: .*truncated",
    "empty": "has 0 bytes",
    "page": "is not an image",
    "header": "cannot be used",
    "too small": r"map is 70 x 49, its image \(turned upright\) is 70 x 50; write both in the same size",
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_an_invalid_map_is_refused_with_shard_and_key(tmp_path, indices, pixels, kind):
    with pytest.raises(ShardError, match=UNUSABLE[kind]) as caught:
        read(tmp_path, [("a/b.jpg", encode(pixels)), ("a/b.seg.png", unusable_mask(kind, indices, pixels))])
    assert (caught.value.shard, caught.value.key) == (f"{tmp_path}/s.tar", "a/b")


def test_a_shard_truncated_after_indexing_is_noticed(tmp_path, indices, pixels):
    write_tar(tmp_path / "s.tar", [("a.jpg", encode(pixels)), ("a.png", palette_png(indices))])
    shards, files = open_shards(str(tmp_path)), FileCache()
    os.truncate(tmp_path / "s.tar", 2000)
    with pytest.raises(ShardError, match="has changed since it was indexed") as caught:
        read_mask(shards, files, 0)
    files.close()
    assert caught.value.shard == f"{tmp_path}/s.tar"


def test_a_full_window_returns_the_map_and_a_flip_mirrors_it(indices):
    square = indices[:50, :50]
    window = np.array([0, 0, 50, 50], np.float32)
    assert np.array_equal(crop_mask(square, window, False, 50), square)
    assert np.array_equal(crop_mask(square, window, True, 50), square[:, ::-1])


def test_indices_are_taken_at_the_centres_of_the_pixels():
    ramp = np.tile(np.arange(60, dtype=np.uint8), (40, 1))
    for extent, size in ((60, 7), (37, 16), (16, 48), (5, 5), (1, 3)):
        crop = crop_mask(ramp, np.array([3, 60 - extent, 30, extent], np.float32), False, size)
        exact = np.floor((np.arange(size) + 0.5) * extent / size) + 60 - extent
        assert crop.shape == (size, size) and (crop == exact).all()


@pytest.mark.parametrize(("extent", "size"), [(224, 64), (64, 64), (96, 224), (151, 32), (97, 51)])
def test_borders_of_a_cropped_map_match_the_antialiased_image(extent, size):
    """An edge in the antialiased crop of the image reaches half brightness at the edge of the cropped map."""
    support = max(1, extent / size) + 1
    for edge in range(int(support) + 1, int(extent - support), 7):
        mask = np.zeros((extent + 9, extent + 5), np.uint8)
        mask[:, edge + 2 :] = 1
        for picture, window in ((mask, [4, 2, extent, extent]), (np.ascontiguousarray(mask.T), [2, 4, extent, extent])):
            image = torch.from_numpy(picture * 255)[..., None].expand(-1, -1, 3)
            image_crop = resized_crop(image, np.array(window, np.float32), size)[..., 0].numpy()
            mask_crop = crop_mask(picture, np.array(window, np.float32), False, size)
            is_clear = abs(image_crop.astype(int) - 127.5) > 1
            assert ((image_crop > 127) == (mask_crop == 1))[is_clear].all()
            assert is_clear.mean() > 0.9


@pytest.mark.parametrize("window", [[0, 0, 51, 10], [0, 61, 10, 10], [-1, 0, 10, 10], [0, 0, 0, 10]])
def test_a_window_outside_the_map_is_refused(indices, window):
    with pytest.raises(ValueError, match=r"window must be inside the mask of height and width \(50, 70\)"):
        crop_mask(indices, np.array(window, np.float32), False, 8)


def test_the_values_of_all_maps_are_listed_by_sample(tmp_path, indices, pixels):
    maps = [indices, np.where(indices == 255, 0, 7).astype(np.uint8), np.full_like(indices, 9)]
    for number, shard_maps in enumerate((maps[:2], maps[2:])):
        members = []
        for key, mask in enumerate(shard_maps):
            members += [(f"{key}.jpg", encode(pixels)), (f"{key}.png", gray_png(mask))]
        write_tar(tmp_path / f"s{number}.tar", members)
    shards = open_shards(str(tmp_path))
    require_masks(shards)
    has_value = read_mask_values(shards, num_threads=2)
    assert [np.flatnonzero(row).tolist() for row in has_value] == [np.unique(mask).tolist() for mask in maps]


def test_corrected_maps_have_another_digest(tmp_path, indices, pixels):
    def shards_with(name, *maps):
        members = []
        for key, mask in enumerate(maps):
            members += [(f"{key}.jpg", encode(pixels)), (f"{key}.png", gray_png(mask))]
        write_tar(tmp_path / name, members)
        return open_shards(str(tmp_path / name))

    first, second = np.where(indices == 255, 0, indices), np.where(indices == 255, 1, indices)
    original, copy, swapped, corrected = (
        shards_with(f"{name}.tar", *maps)
        for name, maps in enumerate([(first, second), (first, second), (second, first), (first, first)])
    )
    assert masks_digest(original, num_threads=2) == masks_digest(copy)
    assert len({masks_digest(shards) for shards in (original, swapped, corrected)}) == 3
    # The digest of the shards does not cover the maps.
    assert original.content_digest == corrected.content_digest


def test_a_missing_or_broken_map_among_many_is_named(tmp_path, indices, pixels):
    members = []
    for key in range(20):
        members += [(f"{key}.jpg", encode(pixels)), (f"{key}.png", gray_png(indices))]
    members[25] = ("12.png", gray_png(indices)[:-100])
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(ShardError, match="segmentation map cannot be used") as caught:
        read_mask_values(open_shards(str(tmp_path)), num_threads=2)
    assert caught.value.key == "12"
    write_tar(tmp_path / "s.tar", members[:25] + members[26:])
    with pytest.raises(ShardError, match=r"no segmentation map \(1 of 20 samples of this shard") as caught:
        require_masks(open_shards(str(tmp_path)))
    assert caught.value.key == "12"
