"""RandAugment with drawn operations: each changes the image, and a batch is a function of its step."""

import numpy as np
import pytest
import torch

from fixtures.tar_files import encode, photograph
from iwm_fast.pipelines.config import IMAGENET, LoaderConfig, RandAugmentConfig
from iwm_fast.pipelines.loader import build_loader
from iwm_fast.pipelines.sampling.batch_plan import FinetunePlan, SampleStream
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.transforms.composition import ViewConfig, identity_draws
from iwm_fast.pipelines.transforms.dali_graph import GraphSettings
from iwm_fast.pipelines.transforms.dali_rand_augment import augment_parameters, build_augment_graph
from iwm_fast.pipelines.transforms.geometry import view_windows
from iwm_fast.pipelines.transforms.image_decoding import decode_image
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.pipelines.transforms.operations.crop import Crop
from iwm_fast.pipelines.transforms.rand_augment import NUM_OPERATIONS, AugmentDraws, draw_augment
from iwm_fast.pipelines.transforms.torch_renderer import resized_crop

SIZE = 64
# Operations that have no magnitude: they equalize or stretch the histogram, or change nothing.
WITHOUT_MAGNITUDE = (11, 12, 13)
WITHOUT_DIRECTION = (9, 10, *WITHOUT_MAGNITUDE)


def augmented(operations: list[int], *, magnitude: int, is_negated: int = 0) -> np.ndarray:
    """Return a photograph changed by each of the operations."""
    count = len(operations)
    settings = GraphSettings(
        views=ViewConfig(size=SIZE), max_batch_size=count, num_threads=1, prefetch=1, device_id=None
    )
    draws = AugmentDraws(
        operation=np.array(operations, np.int32)[:, None], is_negated=np.full((count, 1), is_negated, np.int32)
    )
    encoded = [np.frombuffer(encode(photograph("coffee.png")[:SIZE, :SIZE], "PNG"), np.uint8)] * count
    neutral = identity_draws(ViewConfig(), count)
    parameters = augment_parameters(neutral, view_windows(neutral, np.full((count, 2), SIZE)), draws)
    config = RandAugmentConfig(num_operations=1, magnitude=magnitude)
    return np.array(build_augment_graph(settings, config, lambda: (encoded, *parameters)).run()[0].as_tensor())


def test_operations_change_the_image_more_at_a_higher_magnitude():
    original = photograph("coffee.png")[:SIZE, :SIZE].astype(int)
    operations = list(range(NUM_OPERATIONS))
    weak, strong = (
        np.abs(augmented(operations, magnitude=magnitude) - original).mean(axis=(1, 2, 3)) for magnitude in (6, 30)
    )
    assert strong[13] == weak[13] == 0, "the last operation is the identity"
    for operation in range(13):
        assert strong[operation] > 0.3, operation
        if operation not in WITHOUT_MAGNITUDE:
            assert strong[operation] > weak[operation], operation


def test_directions_differ_for_operations_that_have_two():
    operations = list(range(NUM_OPERATIONS))
    straight, reversed_ = (augmented(operations, magnitude=20, is_negated=flag) for flag in (0, 1))
    undirected = {operation for operation in operations if (straight[operation] == reversed_[operation]).all()}
    assert undirected == set(WITHOUT_DIRECTION)


def test_draws_are_uniform_and_a_function_of_the_slot():
    config = RandAugmentConfig(num_operations=3)
    drawn = draw_augment(config, 0, 5, np.arange(6000))
    assert drawn.operation.shape == (6000, 3)
    counts = np.bincount(drawn.operation.ravel(), minlength=NUM_OPERATIONS)
    assert len(counts) == NUM_OPERATIONS and counts.min() > 1150 and counts.max() < 1420  # 1286 +- 35
    assert abs(drawn.is_negated.mean() - 0.5) < 0.02
    alone = draw_augment(config, 0, 5, np.array([77]))
    assert (alone.operation[0] == drawn.operation[77]).all() and (alone.is_negated[0] == drawn.is_negated[77]).all()


AUGMENT = RandAugmentConfig()


def plan(
    shards: ShardSet, rank: int = 0, world_size: int = 1, augment: RandAugmentConfig | None = AUGMENT
) -> FinetunePlan:
    stream = SampleStream(
        order=SampleOrder([len(shard.keys) for shard in shards.shards], 0, 2),
        global_batch_size=16, micro_batch_size=16 // world_size, rank=rank, world_size=world_size,
    )  # fmt: skip
    views = ViewConfig(size=SIZE, crop=Crop(scale=(0.5, 1.0)))
    return FinetunePlan(views=views, augment=augment, seed=0, grid=8, stream=stream)


def take(plan: FinetunePlan, shards: ShardSet, count: int, first: int = 0, backend: str = "dali") -> list:
    settings = LoaderConfig(loader=backend, reader_threads=2, loader_threads=1, prefetch=2)
    loader = build_loader(plan, shards, settings, torch.device("cpu"), first=first)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def test_finetuning_batches_have_one_augmented_view_and_a_zero_action(tiny_shards):
    shards = open_shards(tiny_shards.pattern)
    for batch in take(plan(shards), shards, 2):
        assert torch.equal(batch.source_view, batch.target_view) and (batch.action == 0).all()
        assert batch.context.total == 16 * 64 and (batch.label == batch.sample % 3).all()
        pixels = denormalize_view(batch.source_view, IMAGENET)
        assert len({image.numpy().tobytes() for image in pixels}) == 16


def test_finetuning_batches_do_not_depend_on_ranks_and_restarts(tiny_shards):
    shards = open_shards(tiny_shards.pattern)
    straight = take(plan(shards), shards, 3)
    (resumed,) = take(plan(shards), shards, 1, first=2)
    assert torch.equal(straight[2].source_view, resumed.source_view) and straight[2].key == resumed.key
    ranks = [take(plan(shards, rank, 2), shards, 3)[2] for rank in (0, 1)]
    assert torch.equal(straight[2].source_view, torch.cat([batch.source_view for batch in ranks]))


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_without_randaugment_images_are_only_cropped_and_flipped(tiny_shards, backend):
    shards = open_shards(tiny_shards.pattern)
    (batch,) = take(plan(shards, augment=None), shards, 1, backend=backend)
    assert torch.equal(batch.source_view, batch.target_view) and (batch.action == 0).all()
    flips = batch.draws.flip
    assert 0 < flips.sum() < 16
    for image, (window, sample) in enumerate(zip(batch.crop_window, batch.sample, strict=True)):
        pixels = decode_image(Reader(shards, num_threads=1).read(sample[None].numpy())[0])
        expected = resized_crop(pixels, window.numpy(), SIZE)
        expected = expected.flip(1) if flips[image] else expected
        actual = denormalize_view(batch.source_view[image : image + 1], IMAGENET)[0]
        # Decoders and resizing differ by a few levels; changed colours would differ by many.
        assert (actual.int() - expected.int()).abs().float().mean() < (2.0 if backend == "dali" else 0.5)


def test_crops_and_order_do_not_depend_on_randaugment(tiny_shards):
    shards = open_shards(tiny_shards.pattern)
    (changed,), (plain,) = (take(plan(shards, augment=augment), shards, 1) for augment in (AUGMENT, None))
    assert changed.key == plain.key and torch.equal(changed.crop_window, plain.crop_window)
    assert (changed.draws.flip == plain.draws.flip).all()
    assert not torch.equal(changed.source_view, plain.source_view)


def test_the_torch_loader_refuses_to_augment(tiny_shards):
    shards = open_shards(tiny_shards.pattern)
    with pytest.raises(ValueError, match=r"runtime.loader must be dali for RandAugment"):
        take(plan(shards), shards, 1, backend="torch")


@pytest.mark.parametrize("settings", [{"num_operations": 0}, {"magnitude": 31}])
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(ValueError, match="must be between"):
        RandAugmentConfig(**settings)
