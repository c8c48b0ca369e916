"""The loader on a GPU: equal inputs, close pixels, the same replacements as on the CPU, and no races with training."""

import io
from itertools import cycle, islice

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.tar_files import encode, photograph, write_tar
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import IMAGENET, LoaderConfig, MaskConfig, RandAugmentConfig
from iwm_fast.pipelines.dali_loader import DaliLoader
from iwm_fast.pipelines.loader import build_loader
from iwm_fast.pipelines.sampling.batch_plan import BatchPlan, FinetunePlan, SampleStream, TrainingPlan
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.pipelines.transforms.operations.crop import Crop
from iwm_fast.pipelines.transforms.operations.flip import Flip
from iwm_fast.pipelines.transforms.operations.solarize import Solarize

pytestmark = pytest.mark.gpu

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
COUNT, GLOBAL_BATCH, SIZE = 48, 16, 64
EXACT = ("crop_window", "source_window", "label", "sample", "scheduled_sample", "slot")


def damaged() -> dict[int, bytes]:
    jpeg, png = (encode(photograph("chelsea.png")[:200, :250], kind) for kind in ("JPEG", "PNG"))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    return {3: jpeg[: len(jpeg) // 2], 4: b"<html>not found</html>", 5: bytes(flipped), 30: jpeg[:-2], 31: b"\xff"}


def files_of_many_kinds() -> dict[int, bytes]:
    """Return an image for each sample: kinds of JPEGs, which a GPU may decode, and files that it leaves to the CPU."""
    turned = [Image.Exif() for _ in range(2)]
    for exif, orientation in zip(turned, (3, 6), strict=True):
        exif[0x0112] = orientation
    kinds = [
        ("RGB", "JPEG", {"subsampling": 0}), ("RGB", "JPEG", {"subsampling": 1}), ("RGB", "JPEG", {"subsampling": 2}),
        ("L", "JPEG", {}), *(("RGB", "JPEG", {"exif": exif}) for exif in turned),
        ("RGB", "JPEG", {"progressive": True}), ("L", "JPEG", {"progressive": True}),
        ("RGB", "WEBP", {}), ("RGB", "PNG", {}), ("P", "PNG", {}),
    ]  # fmt: skip
    files, pixels = {}, photograph("chelsea.png")
    for number, (mode, kind, options) in enumerate(islice(cycle(kinds), COUNT)):
        crop = pixels[number : number + 201, 2 * number : 2 * number + 251]
        Image.fromarray(crop).convert(mode).save(file := io.BytesIO(), kind, **({"quality": 90} | options))
        files[number] = file.getvalue()
    return files


def shards_at(folder, files: dict[int, bytes] | None = None) -> ShardSet:
    """Write three shards of JPEGs, or of these files where there are any."""
    pixels = photograph("chelsea.png")
    for shard in range(3):
        members = []
        for number in range(shard * (COUNT // 3), (shard + 1) * (COUNT // 3)):
            good = encode(pixels[number : number + 200, 2 * number : 2 * number + 250])
            members += [(f"{number:02}.jpg", (files or {}).get(number, good)), (f"{number:02}.cls", b"1")]
        write_tar(folder / f"{shard}.tar", members)
    return open_shards(str(folder))


def stream(shards: ShardSet) -> SampleStream:
    order = SampleOrder([len(shard.keys) for shard in shards.shards], 0, 3)
    return SampleStream(
        order=order, global_batch_size=GLOBAL_BATCH, micro_batch_size=GLOBAL_BATCH, rank=0, world_size=1
    )


def plan(shards: ShardSet, **views) -> TrainingPlan:
    config = ViewConfig(size=SIZE, **views)
    return TrainingPlan(views=config, mask=MaskConfig(), seed=0, grid=8, stream=stream(shards))


def take(plan: BatchPlan, shards: ShardSet, count: int, device=GPU, first: int = 0, **settings) -> list[Batch]:
    settings = {"reader_threads": 4, "loader_threads": 4, "prefetch": 2, "max_bad_samples": 100.0} | settings
    loader = build_loader(plan, shards, LoaderConfig(**settings), device, first=first)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def assert_close(fast: Batch, plain: Batch) -> None:
    for name in EXACT:
        assert torch.equal(getattr(fast, name), getattr(plain, name)), name
    assert torch.equal(fast.action.cpu(), plain.action) and fast.key == plain.key
    assert torch.equal(fast.target.row.cpu(), plain.target.row)
    assert fast.source_view.device == fast.action.device == fast.context.patch.device == GPU
    for view in ("source_view", "target_view"):
        pixels = [denormalize_view(getattr(batch, view), IMAGENET).cpu().int() for batch in (fast, plain)]
        difference = (pixels[0] - pixels[1]).abs().float()
        # Decoders and resizing differ by a few grey levels, which solarize enlarges for values near 128.
        assert difference.mean() < 1.5 and difference.quantile(0.98) <= 8, view


@pytest.mark.parametrize("views", [{}, {"crop": Crop(source_scale=(0.2, 0.8)), "flip": Flip(source_probability=0.5)}])
def test_batches_are_the_same_on_a_gpu_and_on_the_cpu(tmp_path, views):
    shards = shards_at(tmp_path)
    fast, plain = (take(plan(shards, **views), shards, 4, device) for device in (GPU, CPU))
    for pair in zip(fast, plain, strict=True):
        assert_close(*pair)


@pytest.mark.parametrize("views", [{}, {"crop": Crop(source_scale=(0.2, 0.8))}])
def test_images_of_many_kinds_are_decoded_on_the_gpu_like_on_the_cpu(tmp_path, views):
    shards = shards_at(tmp_path, files_of_many_kinds())
    drawn = plan(shards, solarize=Solarize(probability=0), **views)
    by_gpu, by_cpu = (take(drawn, shards, COUNT // GLOBAL_BATCH, decode=decode) for decode in ("gpu", "cpu"))
    for fast, plain in zip(by_gpu, by_cpu, strict=True):
        assert fast.key == plain.key and torch.equal(fast.sample, fast.scheduled_sample)
        for view in ("source_view", "target_view"):
            pixels = [denormalize_view(getattr(batch, view), IMAGENET).int() for batch in (fast, plain)]
            difference = (pixels[0] - pixels[1]).abs().float().flatten(1)
            for key, levels in zip(fast.key, difference, strict=True):
                assert levels.mean() < 1.5 and levels.quantile(0.98) <= 8, (view, key)


def test_views_lie_in_memory_of_torch(tmp_path):
    """Only there, `record_stream` protects them, and freeing them does not synchronise the device."""
    shards = shards_at(tmp_path)
    (batch,) = take(plan(shards), shards, 1)
    segments = torch.cuda.memory_snapshot()
    for view in (batch.source_view, batch.target_view):
        assert any(0 <= view.data_ptr() - segment["address"] < segment["total_size"] for segment in segments)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_loader_leaves_other_gpus_alone(tmp_path):
    shards, device = shards_at(tmp_path), torch.device("cuda", 1)
    loader = build_loader(plan(shards), shards, LoaderConfig(reader_threads=1, loader_threads=1, prefetch=1), device)
    assert isinstance(loader, DaliLoader) and next(loader).source_view.device == device
    assert loader._renderer.submit(torch.cuda.current_device).result() == 1
    loader.close()


@pytest.mark.parametrize("decode", ["gpu", "cpu"])
def test_bad_images_are_replaced_like_on_the_cpu(tmp_path, decode):
    bad = damaged()
    shards = shards_at(tmp_path, bad)
    fast, plain = (take(plan(shards), shards, 6, device, decode=decode) for device in (GPU, CPU))
    for pair in zip(fast, plain, strict=True):
        assert_close(*pair)
    shown = torch.cat([batch.sample for batch in fast]).tolist()
    assert not set(shown) & set(bad) and len(shown) == 6 * GLOBAL_BATCH


def test_resuming_gives_the_same_inputs_and_pixels(tmp_path):
    shards = shards_at(tmp_path, damaged())
    uninterrupted = take(plan(shards), shards, 5)[3:]
    resumed = take(plan(shards), shards, 2, first=3)
    for first, second in zip(uninterrupted, resumed, strict=True):
        for name in EXACT:
            assert torch.equal(getattr(first, name), getattr(second, name)), name
        difference = (
            denormalize_view(first.source_view, IMAGENET).int() - denormalize_view(second.source_view, IMAGENET).int()
        ).abs()
        # Which of the decoders takes an image varies from run to run.
        assert difference.float().mean() < 0.5


def test_slow_training_reads_complete_batches(tmp_path):
    """A batch that was rendered ahead in another stream is complete and is not overwritten before training used it."""
    shards = shards_at(tmp_path)
    expected = [batch.source_view.double().sum() for batch in take(plan(shards), shards, 12)]
    torch.cuda.synchronize()
    settings = LoaderConfig(reader_threads=4, loader_threads=4, prefetch=2)
    loader = build_loader(plan(shards), shards, settings, GPU)
    sums = []
    matrix = torch.randn(4096, 4096, device=GPU)
    for _ in range(12):
        batch = next(loader)
        for _ in range(10):
            matrix = (matrix @ matrix).clamp(-1, 1)
        # The GPU computes this sum after the products, when the host has already dropped the batch.
        sums.append(batch.source_view.double().sum())
        del batch
    loader.close()
    torch.testing.assert_close(torch.stack(sums), torch.stack(expected), rtol=1e-3, atol=50.0)


@pytest.mark.parametrize(
    "settings",
    [{"hw_decoder_load": 0.0}, {"hw_decoder_load": 1.0}, {"decoder_preallocate": (250, 200)}, {"decode": "cpu"}],
)
def test_settings_of_the_decoder_do_not_change_the_batches(tmp_path, settings):
    shards = shards_at(tmp_path)
    for pair in zip(take(plan(shards), shards, 2, **settings), take(plan(shards), shards, 2, CPU), strict=True):
        assert_close(*pair)


@pytest.mark.parametrize("decode", ["gpu", "cpu"])
def test_rand_augment_is_the_same_on_a_gpu_and_on_the_cpu(tmp_path, decode):
    shards = shards_at(tmp_path)
    finetuning = FinetunePlan(
        views=ViewConfig(size=SIZE), augment=RandAugmentConfig(), seed=0, grid=8, stream=stream(shards)
    )
    for fast, plain in zip(*(take(finetuning, shards, 3, device, decode=decode) for device in (GPU, CPU)), strict=True):
        pixels = [denormalize_view(batch.source_view, IMAGENET).cpu().int() for batch in (fast, plain)]
        difference = (pixels[0] - pixels[1]).abs().float().mean(dim=(1, 2, 3)).numpy()
        # A posterised or solarized pixel may fall on either side of a threshold.
        assert np.median(difference) < 3 and difference.mean() < 8
