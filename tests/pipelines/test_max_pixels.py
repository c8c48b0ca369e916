"""data.max_pixels holds wherever an image or a mask is decoded, and is read from the header."""

import os
import struct
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.image_matrix import HEIGHT, WIDTH, base_pixels
from fixtures.tar_files import encode, write_tar
from iwm_fast import world_model
from iwm_fast.cli import main
from iwm_fast.config.evaluation import EvalDataConfig
from iwm_fast.config.fingerprint import fingerprint
from iwm_fast.config.run import RunConfig
from iwm_fast.evals.datasets import require_readable, training_shards, validation_shards
from iwm_fast.pipelines.annotations.segmentation import read_mask
from iwm_fast.pipelines.config import MAX_PIXELS, DataConfig, LoaderConfig
from iwm_fast.pipelines.errors import ShardError, UndecodableImageError
from iwm_fast.pipelines.loader import build_loader
from iwm_fast.pipelines.sampling.batch_plan import EvaluationPlan
from iwm_fast.pipelines.storage.reader import FileCache
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms import image_decoding
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.image_decoding import decode_image

NUM_PIXELS = WIDTH * HEIGHT
TOO_LARGE = f"has {WIDTH} x {HEIGHT} = {NUM_PIXELS} pixels, above data.max_pixels={NUM_PIXELS - 1}"


def bomb(side: int) -> bytes:
    """Return a black PNG of 1 bit per pixel, which compresses to nearly nothing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header, rows = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0), bytes((1 + (side + 7) // 8) * side)
    chunks = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows, 9)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@pytest.fixture
def shard(tmp_path) -> str:
    """Write a shard whose first image is small and whose second image and mask have NUM_PIXELS pixels."""
    small, large = base_pixels()[:20, :20].copy(), base_pixels()
    members = [("0.jpg", encode(small)), ("0.seg.png", encode(small[..., 0], "PNG"))]
    write_tar(tmp_path / "s.tar", [*members, ("1.jpg", encode(large)), ("1.seg.png", encode(large[..., 0], "PNG"))])
    os.utime(tmp_path / "s.tar", ns=(10**18, 10**18))
    return str(tmp_path / "s.tar")


def drawn(path: str, backend: str, max_pixels: int) -> list[int]:
    shards = open_shards(path, max_pixels=max_pixels)
    settings = LoaderConfig(loader=backend, reader_threads=1, loader_threads=1, prefetch=1, max_bad_samples=9.0)
    plan = EvaluationPlan(
        views=ViewConfig(size=32), grid=4, samples=np.arange(2), micro_batch_size=2, leaves_out_bad_samples=True
    )
    loader = build_loader(plan, shards, settings, torch.device("cpu"))
    try:
        return [sample for batch in loader for sample in batch.sample.tolist()]
    finally:
        loader.close()


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_loaders_replace_and_name_an_image_above_the_limit(shard, backend, caplog):
    assert drawn(shard, backend, NUM_PIXELS) == [0, 1] and not caplog.records
    assert drawn(shard, backend, NUM_PIXELS - 1) == [0, 0]
    assert f"cannot decode {shard}:1 ({TOO_LARGE}" in caplog.text


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_a_decompression_bomb_of_a_few_kilobytes_is_left_out_by_default(tmp_path, backend, caplog):
    content = bomb(20_000)
    assert len(content) < 60_000
    write_tar(tmp_path / "s.tar", [("0.png", encode(base_pixels(), "PNG")), ("1.png", content)])
    assert drawn(str(tmp_path / "s.tar"), backend, DataConfig().max_pixels) == [0, 0]
    assert "has 20000 x 20000 = 400000000 pixels, above data.max_pixels=178956970" in caplog.text


def test_the_check_leaves_out_what_is_above_its_limit(shard, capsys):
    main(["shards", "check", shard, f"max_pixels={NUM_PIXELS - 1}"])
    assert f"{shard}:1 {TOO_LARGE}" in capsys.readouterr().out.replace("\n", "")
    assert open_shards(shard).shards[0].keys == ("0",)
    main(["shards", "check", shard])
    assert open_shards(shard).shards[0].keys == ("0", "1")
    with pytest.raises(SystemExit, match="2"):
        main(["shards", "check", shard, "max_pixels=0"])
    assert "max_pixels must be at least 1, got 0" in capsys.readouterr().err


def test_masks_above_the_limit_are_refused(shard):
    files = FileCache()
    assert read_mask(open_shards(shard), files, 1).size == NUM_PIXELS
    with pytest.raises(ShardError, match=f"sample '1': segmentation map cannot be used: {TOO_LARGE}"):
        read_mask(open_shards(shard, max_pixels=NUM_PIXELS - 1), files, 1)
    files.close()


def test_evaluations_use_the_limit_of_the_run_or_their_own(shard):
    config = RunConfig(data=DataConfig(train=shard, val=shard, max_pixels=NUM_PIXELS - 1), views=ViewConfig(size=32))
    model = world_model.build_untrained(tiny(config))
    for open_set in (training_shards, validation_shards):
        limited = open_set(model, EvalDataConfig())
        with pytest.raises(ShardError, match=TOO_LARGE):
            require_readable((limited, np.arange(2)))
        require_readable((open_set(model, EvalDataConfig(max_pixels=NUM_PIXELS)), np.arange(2)))
        require_readable((open_set(model, EvalDataConfig(train=shard, max_pixels=NUM_PIXELS)), np.arange(2)))


def test_the_python_interface_has_the_limit_of_the_run_or_its_own(tmp_path):
    config = RunConfig(data=DataConfig(max_pixels=NUM_PIXELS - 1), views=ViewConfig(size=32))
    model, path = world_model.build_untrained(tiny(config)), tmp_path / "large.jpg"
    path.write_bytes(encode(base_pixels()))
    assert model.load_image(path, max_pixels=NUM_PIXELS).shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match=f"large.jpg must be a complete image .*, but it {TOO_LARGE}"):
        model.load_image(path)


def tiny(config: RunConfig) -> RunConfig:
    encoder = replace(config.model.encoder, dim=16, depth=1, num_heads=1, patch_size=8)
    predictor = replace(config.model.predictor, dim=16, depth=1, num_heads=1)
    return replace(
        config, model=replace(config.model, encoder=encoder, predictor=predictor),
        views=replace(config.views, blur=replace(config.views.blur, sigma=(0.1, 1.0))),
    )  # fmt: skip


def test_a_run_from_before_the_setting_resumes_and_another_limit_is_a_difference():
    default, raised = (
        fingerprint(replace(RunConfig(), data=DataConfig(max_pixels=limit)), "digest")
        for limit in (MAX_PIXELS, MAX_PIXELS + 1)
    )
    # A missing entry compares as None.
    assert default["data.max_pixels"] is None and raised["data.max_pixels"] == MAX_PIXELS + 1


@pytest.mark.parametrize("limit", [0, -5])
def test_the_limit_must_be_positive(limit):
    with pytest.raises(ValueError, match=rf"data\.max_pixels must be at least 1, got {limit}"):
        DataConfig(max_pixels=limit)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_pillows_own_limit_neither_warns_nor_refuses(kind, monkeypatch):
    content = encode(base_pixels(), kind)
    # Warnings are errors in these tests.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", NUM_PIXELS // 3)
    monkeypatch.setattr(image_decoding, "_PILLOW_WARNS_ABOVE", NUM_PIXELS // 3)
    assert decode_image(content).shape == (HEIGHT, WIDTH, 3)
    assert NUM_PIXELS // 3 == Image.MAX_IMAGE_PIXELS
    with pytest.raises(UndecodableImageError, match=r"above data\.max_pixels=10"):
        decode_image(content, 10)
