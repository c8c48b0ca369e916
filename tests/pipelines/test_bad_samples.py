"""Images that cannot be decoded are replaced and logged, the same way on all ranks, and too many end the run."""

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.tar_files import encode, photograph, write_tar
from iwm_fast.pipelines.bad_samples import BadSampleReplacer
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import LoaderConfig, MaskConfig
from iwm_fast.pipelines.errors import ShardError, UndecodableImageError
from iwm_fast.pipelines.loader import build_loader
from iwm_fast.pipelines.sampling.batch_plan import EvaluationPlan, SampleStream, TrainingPlan
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.image_decoding import decode_image

GLOBAL_BATCH = 8
BACKENDS = ["dali", "torch"]


def damaged(kind: str) -> bytes:
    jpeg, png = (encode(photograph("coffee.png")[:64, :80], name) for name in ("JPEG", "PNG"))
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    headless = bytearray(jpeg)
    headless[100:160] = bytes(range(60))
    return {
        "truncated": jpeg[: len(jpeg) // 3],
        "one byte": b"\xff",
        "no byte": b"",
        "html": b"<html>not found</html>",
        "truncated png": png[: len(png) // 2],
        # These two look complete, so only the decoder detects them.
        "png with a wrong checksum": bytes(flipped),
        "jpeg with a broken header": bytes(headless),
    }[kind]


KINDS = ["truncated", "one byte", "no byte", "html", "truncated png", "png with a wrong checksum",
         "jpeg with a broken header"]  # fmt: skip


def shards_with(folder, bad: dict[int, bytes], count: int = 24) -> ShardSet:
    pixels = photograph("chelsea.png")
    for shard in range(3):
        members = []
        for number in range(shard * (count // 3), (shard + 1) * (count // 3)):
            good = encode(pixels[number : number + 64, 2 * number : 2 * number + 80])
            members += [(f"{number:02}.jpg", bad.get(number, good)), (f"{number:02}.cls", str(number % 5).encode())]
        write_tar(folder / f"{shard}.tar", members)
    return open_shards(str(folder))


def training_plan(shards: ShardSet, *, rank: int = 0, world_size: int = 1, micro: int = GLOBAL_BATCH) -> TrainingPlan:
    order = SampleOrder([len(shard.keys) for shard in shards.shards], 0, 3)
    stream = SampleStream(
        order=order, global_batch_size=GLOBAL_BATCH, micro_batch_size=micro, rank=rank, world_size=world_size
    )
    return TrainingPlan(views=ViewConfig(size=32), mask=MaskConfig(), seed=0, grid=4, stream=stream)


def take(plan, shards: ShardSet, count: int, backend: str = "dali", max_bad_samples: float = 100.0) -> list[Batch]:
    settings = LoaderConfig(
        loader=backend, reader_threads=2, loader_threads=1, prefetch=2, max_bad_samples=max_bad_samples
    )
    loader = build_loader(plan, shards, settings, torch.device("cpu"))
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bad_image_is_replaced_by_the_sample_of_the_next_slot_and_logged(tmp_path, backend, kind, caplog):
    shards = shards_with(tmp_path, {7: damaged(kind)})
    batches = take(training_plan(shards), shards, 6, backend)  # two epochs
    scheduled = torch.cat([batch.scheduled_sample for batch in batches])
    shown = torch.cat([batch.sample for batch in batches])
    assert (scheduled == 7).sum() == 2 and torch.equal(shown != scheduled, scheduled == 7)
    for batch in batches:
        for slot in (batch.scheduled_sample == 7).nonzero().flatten().tolist():
            following = (slot + 1) % GLOBAL_BATCH
            assert batch.sample[slot] == batch.scheduled_sample[following]
            # Key and label belong to the image that is shown.
            assert batch.key[slot] == batch.key[following] and batch.label[slot] == batch.label[following]
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1, "it is logged once, though it comes in every epoch"
    message = warnings[0].getMessage()
    assert f"{tmp_path}/0.tar:07" in message and "bad samples so far: 1" in message


def test_a_replacement_keeps_the_random_parameters_of_its_slot(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    intact, damaged_shards = shards_with(good, {}), shards_with(bad, {7: damaged("html")})
    batches = (take(training_plan(shards), shards, 3) for shards in (intact, damaged_shards))
    for expected, actual in zip(*batches, strict=True):
        assert torch.equal(actual.action, expected.action) and torch.equal(actual.target.patch, expected.target.patch)
        is_same = actual.sample == expected.sample
        assert torch.equal(actual.source_view[is_same], expected.source_view[is_same])
        assert torch.equal(actual.scheduled_sample, expected.scheduled_sample)


@pytest.mark.parametrize("kind", ["truncated", "png with a wrong checksum"])
def test_ranks_micro_batches_and_loaders_choose_the_same_replacements(tmp_path, kind):
    # Some of them follow each other in the order, so that a first choice is bad, too, and consecutive batches fail.
    bad = {number: damaged(kind) for number in (0, 3, 5, 6, 11, 12, 13, 20)}
    shards = shards_with(tmp_path, bad)
    single = take(training_plan(shards), shards, 6)
    assert not set(torch.cat([batch.sample for batch in single]).tolist()) & set(bad)
    reference = take(training_plan(shards), shards, 6, "torch")
    ranks = [take(training_plan(shards, rank=rank, world_size=2, micro=2), shards, 12) for rank in (0, 1)]
    for step, batch in enumerate(single):
        assert torch.equal(batch.sample, reference[step].sample) and batch.key == reference[step].key
        assert (batch.source_view - reference[step].source_view).abs().mean() < 0.05
        parts = sorted(
            ranks[0][2 * step : 2 * step + 2] + ranks[1][2 * step : 2 * step + 2], key=lambda part: int(part.slot[0])
        )
        assert torch.equal(batch.sample, torch.cat([part.sample for part in parts]))
        assert torch.equal(batch.source_view, torch.cat([part.source_view for part in parts]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("max_bad_samples", "limit"), [(2.0, 2), (0.1, 2), (0.0, 0)])
def test_too_many_bad_samples_end_the_run_with_shard_and_key(tmp_path, backend, max_bad_samples, limit):
    shards = shards_with(tmp_path, {number: damaged("html") for number in (1, 9, 17)})
    message = f"bad sample {limit + 1} and runtime.max_bad_samples = {max_bad_samples:g} allows {limit}"
    with pytest.raises(ShardError, match=message) as caught:
        take(training_plan(shards), shards, 6, backend, max_bad_samples)
    number = int(caught.value.key)
    assert number in (1, 9, 17) and caught.value.shard == str(tmp_path / f"{number // 8}.tar")
    assert "iwm shards check" in str(caught.value)


def tiny_files(folder, count: int) -> ShardSet:
    write_tar(folder / "0.tar", [(f"{number:04}.jpg", b"%d" % number) for number in range(count)])
    return open_shards(str(folder))


def num_bad_until_the_end(shards: ShardSet, world_size: int, share: float, num_good_first: int = 0) -> int:
    """Return how many bad samples one of several ranks replaces before it exceeds the limit; half of all are bad."""
    plan = training_plan(shards, world_size=world_size, micro=GLOBAL_BATCH // world_size)
    reader = Reader(shards, num_threads=1)
    replacer = BadSampleReplacer(plan, shards, reader, share, prepare_candidate=bytes)
    num_bad = 0
    try:
        with pytest.raises(ShardError, match=f"is bad sample [0-9]+ and runtime.max_bad_samples = {share:g} allows"):
            for index in range(10**6):
                request = plan.request(index)
                is_bad = (request.slots % 2 == 0) & (index >= num_good_first)
                replacer.replace(request, [UndecodableImageError("cut off") if bad else b"" for bad in is_bad])
                num_bad += int(is_bad.sum())
    finally:
        reader.close()
    return num_bad


def test_a_share_is_of_the_images_that_a_rank_draws(tmp_path):
    shards = tiny_files(tmp_path, 960)
    assert num_bad_until_the_end(shards, 1, 0.25) == 240
    # Of the 120 images per epoch of rank 0, which are all bad.
    assert num_bad_until_the_end(shards, 8, 0.25) == 30
    # Bad samples of all ranks come to each of them in the course of epochs, so the limit grows with what is drawn.
    assert num_bad_until_the_end(shards, 8, 0.25, num_good_first=400) > 100
    assert num_bad_until_the_end(shards, 8, 0.01) == 9, "one of few images is no reason to stop"


@pytest.mark.parametrize("backend", BACKENDS)
def test_each_candidate_is_read_once_however_many_bad_samples_follow_each_other(tmp_path, monkeypatch, backend):
    bad = {number: damaged("png with a wrong checksum") for number in range(40)}
    shards = shards_with(tmp_path, bad, count=48)
    plan = EvaluationPlan(
        views=ViewConfig(size=32), grid=4, samples=np.arange(48), micro_batch_size=8, leaves_out_bad_samples=True
    )
    read, candidates = Reader.read, []
    monkeypatch.setattr(
        Reader, "read", lambda self, samples, prepare: candidates.extend(samples) or read(self, samples, prepare)
    )
    batches = take(plan, shards, 6, backend)
    shown = torch.cat([batch.sample for batch in batches]).tolist()
    assert shown == [40] * 40 + list(range(40, 48))
    tried_in_vain = [sample for sample in candidates if sample in bad]
    scheduled = 1 if backend == "torch" else 0  # this loader reads the batch itself with the same method
    assert len(tried_in_vain) <= 39 + scheduled * 40


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_without_any_good_image_is_an_error(tmp_path, backend):
    shards = shards_with(tmp_path, {number: damaged("truncated") for number in range(24)})
    with pytest.raises(ShardError, match="no other sample can replace it"):
        take(training_plan(shards), shards, 1, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["truncated", "html", "png with a wrong checksum"])
def test_evaluations_do_not_replace_bad_images(tmp_path, backend, kind):
    shards = shards_with(tmp_path, {7: damaged(kind)})
    plan = EvaluationPlan(views=ViewConfig(size=32), grid=4, samples=np.arange(24), micro_batch_size=8)
    with pytest.raises(ShardError, match=r"sample '07': cannot decode the image") as caught:
        take(plan, shards, 3, backend)
    assert caught.value.shard == str(tmp_path / "0.tar")


def test_a_complete_file_that_looks_truncated_is_used(tmp_path, caplog):
    # A JPEG with zeros after its end marker, and a bitmap, which has no end marker.
    padded = encode(photograph("coffee.png")[:64, :80]) + bytes(500)
    file = io.BytesIO()
    Image.fromarray(photograph("coffee.png")[:64, :80]).save(file, "BMP")
    shards = shards_with(tmp_path, {3: padded, 7: file.getvalue()})
    for backend in BACKENDS:
        batches = take(training_plan(shards), shards, 3, backend, 0.0)
        assert all(torch.equal(batch.sample, batch.scheduled_sample) for batch in batches)
    assert not caplog.records


@pytest.mark.parametrize("kind", ["GIF", "ICO"])
def test_a_format_that_dali_cannot_read_is_bad_for_both_loaders(tmp_path, kind):
    file = io.BytesIO()
    Image.fromarray(photograph("coffee.png")[:64, :64]).save(file, kind)
    shards = shards_with(tmp_path, {7: file.getvalue()})
    for backend in BACKENDS:
        batches = take(training_plan(shards), shards, 3, backend)
        assert sum(int((batch.sample != batch.scheduled_sample).sum()) for batch in batches) == 1


def test_sixteen_bits_are_scaled_and_cmyk_is_converted(tmp_path):
    gray = np.array(Image.fromarray(photograph("coffee.png")[:64, :80]).convert("L"))
    gray16, cmyk = io.BytesIO(), io.BytesIO()
    Image.fromarray(gray.astype(np.uint16) * 257).save(gray16, "PNG")
    Image.fromarray(photograph("coffee.png")[:64, :80]).convert("CMYK").save(cmyk, "JPEG", quality=95)
    decoded = decode_image(np.frombuffer(gray16.getvalue(), np.uint8))
    assert torch.equal(decoded, torch.from_numpy(gray)[..., None].expand(-1, -1, 3))
    shards = shards_with(tmp_path, {7: gray16.getvalue(), 12: cmyk.getvalue()})
    for fast, plain in zip(
        *(take(training_plan(shards), shards, 3, backend, 0.0) for backend in BACKENDS), strict=True
    ):
        assert (fast.target_view - plain.target_view).abs().mean() < 0.05
