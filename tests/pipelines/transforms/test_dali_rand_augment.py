"""RandAugment with our draws: every operation does something, and a batch is a function of its step."""

import numpy as np
import pytest
import torch

from fixtures.tar_files import encode, photograph
from iwm_fast.pipelines.config import LoaderConfig, RandAugmentConfig, ViewConfig
from iwm_fast.pipelines.loader import build_loader
from iwm_fast.pipelines.sampling.batch_plan import FinetunePlan, SampleStream
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.reader import Reader
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.transforms.dali_graph import GraphSettings
from iwm_fast.pipelines.transforms.dali_rand_augment import augment_parameters, build_augment_graph
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.pipelines.transforms.parameters import NUM_OPERATIONS, AugmentDraws, draw_augment, identity_draws
from iwm_fast.pipelines.transforms.torch_renderer import decode_image, resized_crop

SIZE = 64
# no magnitude: what makes the histogram flat, stretches it, or changes nothing
WITHOUT_STRENGTH = (11, 12, 13)
WITHOUT_DIRECTION = (9, 10, *WITHOUT_STRENGTH)


def augmented(operations: list[int], *, magnitude: int, is_negated: int = 0) -> np.ndarray:
    """Apply one operation to one photograph, for each of the given ones."""
    count = len(operations)
    settings = GraphSettings(
        views=ViewConfig(size=SIZE), max_batch_size=count, num_threads=1, prefetch=1, device_id=None
    )
    draws = AugmentDraws(
        operation=np.array(operations, np.int32)[:, None], is_negated=np.full((count, 1), is_negated, np.int32)
    )
    encoded = [np.frombuffer(encode(photograph("coffee.png")[:SIZE, :SIZE], "PNG"), np.uint8)] * count
    parameters = augment_parameters(identity_draws(count), draws)
    config = RandAugmentConfig(num_operations=1, magnitude=magnitude)
    return np.array(build_augment_graph(settings, config, lambda: (encoded, *parameters)).run()[0].as_tensor())


def test_every_operation_but_identity_changes_the_image_and_more_with_more_strength():
    original = photograph("coffee.png")[:SIZE, :SIZE].astype(int)
    everything = list(range(NUM_OPERATIONS))
    weak, strong = (np.abs(augmented(everything, magnitude=m) - original).mean(axis=(1, 2, 3)) for m in (6, 30))
    assert strong[13] == weak[13] == 0, "identity is the last"
    for operation in range(13):
        assert strong[operation] > 0.3, operation
        if operation not in WITHOUT_STRENGTH:
            assert strong[operation] > weak[operation], operation


def test_directions_differ_where_there_are_two():
    everything = list(range(NUM_OPERATIONS))
    one_way, other_way = (augmented(everything, magnitude=20, is_negated=flag) for flag in (0, 1))
    same = {operation for operation in everything if (one_way[operation] == other_way[operation]).all()}
    assert same == set(WITHOUT_DIRECTION)


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
    views = ViewConfig(size=SIZE, crop_scale=(0.5, 1.0))
    return FinetunePlan(views=views, augment=augment, seed=0, grid=8, stream=stream)


def take(plan: FinetunePlan, shards: ShardSet, count: int, first: int = 0, backend: str = "dali") -> list:
    settings = LoaderConfig(loader=backend, reader_threads=2, loader_threads=1, prefetch=2)
    loader = build_loader(plan, shards, settings, torch.device("cpu"), first=first)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def test_finetuning_batches_hold_one_augmented_view_its_label_and_no_action(tiny_shards):
    shards = open_shards(tiny_shards.pattern)
    for batch in take(plan(shards), shards, 2):
        assert torch.equal(batch.source_view, batch.target_view) and (batch.action == 0).all()
        assert batch.context.total == 16 * 64 and (batch.label == batch.sample % 3).all()
        pixels = denormalize_view(batch.source_view)
        assert len({image.numpy().tobytes() for image in pixels}) == 16


def test_a_finetuning_batch_is_the_same_for_other_ranks_and_after_a_restart(tiny_shards):
    shards = open_shards(tiny_shards.pattern)
    straight = take(plan(shards), shards, 3)
    (resumed,) = take(plan(shards), shards, 1, first=2)
    assert torch.equal(straight[2].source_view, resumed.source_view) and straight[2].key == resumed.key
    ranks = [take(plan(shards, rank, 2), shards, 3)[2] for rank in (0, 1)]
    assert torch.equal(straight[2].source_view, torch.cat([part.source_view for part in ranks]))


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_without_randaugment_images_are_cropped_and_mirrored_and_nothing_else(tiny_shards, backend):
    shards = open_shards(tiny_shards.pattern)
    (batch,) = take(plan(shards, augment=None), shards, 1, backend=backend)
    assert torch.equal(batch.source_view, batch.target_view) and (batch.action == 0).all()
    flips = batch.draws.flip
    assert 0 < flips.sum() < 16
    for image, (window, sample) in enumerate(zip(batch.crop_window, batch.sample, strict=True)):
        pixels = decode_image(Reader(shards, num_threads=1).read(sample[None].numpy())[0])
        wanted = resized_crop(pixels, window.numpy(), SIZE)
        wanted = wanted.flip(1) if flips[image] else wanted
        shown = denormalize_view(batch.source_view[image : image + 1])[0]
        # decoders and resizing differ by little, colours by much
        assert (shown.int() - wanted.int()).abs().float().mean() < (2.0 if backend == "dali" else 0.5)


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
