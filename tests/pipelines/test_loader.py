import dataclasses

import numpy as np
import pytest
import torch

from fixtures.tar_files import encode, photograph, write_tar
from iwm_fast.pipelines.batch import Batch, RaggedIndex
from iwm_fast.pipelines.config import LoaderConfig, MaskConfig, ViewConfig
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.loader import build_loader
from iwm_fast.pipelines.sampling.batch_plan import EvaluationPlan, SampleStream, TrainingPlan
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.transforms.normalization import denormalize_view, normalize_view
from iwm_fast.pipelines.transforms.parameters import Draws

VIEWS = ViewConfig(size=32)
GLOBAL_BATCH = 32


def training_plan(
    shards: ShardSet, *, rank: int = 0, world_size: int = 1, micro: int = GLOBAL_BATCH, seed: int = 0, views=VIEWS
):
    return TrainingPlan(
        views=views,
        mask=MaskConfig(),
        seed=seed,
        grid=8,
        stream=SampleStream(
            order=SampleOrder([len(shard.keys) for shard in shards.shards], seed, 2),
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro,
            rank=rank,
            world_size=world_size,
        ),
    )


def settings(backend: str = "dali", **changes) -> LoaderConfig:
    chosen = {"reader_threads": 2, "loader_threads": 1, "prefetch": 2} | changes
    return LoaderConfig(loader=backend, **chosen)


def take(plan, shards: ShardSet, count: int, first: int = 0, **changes) -> list[Batch]:
    loader = build_loader(plan, shards, settings(**changes), torch.device("cpu"), first=first)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def flat(batch: Batch) -> dict[str, torch.Tensor | tuple | int]:
    """Everything in a batch that training depends on."""
    values = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, RaggedIndex):
            values |= {f"{field.name}.{name}": item for name, item in vars(value).items()}
        elif isinstance(value, Draws):
            values |= flat_draws(value, field.name)
        else:
            values[field.name] = value
    return values


def flat_draws(draws, prefix: str) -> dict[str, torch.Tensor]:
    values = {}
    for name, value in vars(draws).items():
        is_array = isinstance(value, np.ndarray)
        values |= {f"{prefix}.{name}": torch.from_numpy(value)} if is_array else flat_draws(value, f"{prefix}.{name}")
    return values


def assert_same_batch(first: Batch, second: Batch) -> None:
    mine, other = flat(first), flat(second)
    for name, value in mine.items():
        same = torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        assert same, name


def join(parts: list[Batch]) -> Batch:
    """Put micro-batches of one step together in the order of their slots."""
    parts = sorted(parts, key=lambda part: int(part.slot[0]))
    joined = {
        name: torch.cat([getattr(part, name) for part in parts])
        for name in (
            "source_view",
            "target_view",
            "action",
            "crop_window",
            "source_window",
            "label",
            "sample",
            "scheduled_sample",
            "slot",
        )
    }
    key = tuple(name for part in parts for name in part.key)
    indexes = {name: join_indexes([getattr(part, name) for part in parts]) for name in ("context", "target")}
    return Batch(**joined, **indexes, key=key, step=parts[0].step, draws=join_draws([part.draws for part in parts]))


def join_draws(parts: list) -> object:
    """Put dataclasses of arrays together, whatever they hold."""
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return type(parts[0])(**{name: join_draws([getattr(part, name) for part in parts]) for name in vars(parts[0])})


def join_indexes(parts: list[RaggedIndex]) -> RaggedIndex:
    images = np.cumsum([0] + [len(part.offsets) - 1 for part in parts])
    lengths = torch.cat([part.offsets.diff() for part in parts])
    return RaggedIndex(
        patch=torch.cat([part.patch for part in parts]),
        row=torch.cat([part.row + 64 * int(image) for part, image in zip(parts, images[:-1], strict=True)]),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)]),
        longest=max(part.longest for part in parts),
        total=parts[0].total,
    )


@pytest.fixture(scope="module")
def shards(tiny_shards) -> ShardSet:
    return open_shards(tiny_shards.pattern)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_ranks_and_micro_batches_get_the_same_batch_bit_for_bit(shards, backend):
    whole = take(training_plan(shards), shards, 3, backend=backend)
    two_ranks = [
        take(training_plan(shards, rank=rank, world_size=2, micro=16), shards, 3, backend=backend) for rank in (0, 1)
    ]
    accumulated = take(training_plan(shards, micro=8), shards, 12, backend=backend)
    for step, batch in enumerate(whole):
        assert_same_batch(batch, join([ranks[step] for ranks in two_ranks]))
        assert_same_batch(batch, join(accumulated[4 * step : 4 * step + 4]))


def test_threads_and_prefetch_do_not_change_a_batch(shards):
    reference = take(training_plan(shards), shards, 3)
    other = take(training_plan(shards), shards, 3, reader_threads=3, loader_threads=2, prefetch=1)
    for first, second in zip(reference, other, strict=True):
        assert_same_batch(first, second)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_starting_in_the_middle_gives_the_batches_of_a_straight_run(shards, backend):
    straight = take(training_plan(shards), shards, 4, backend=backend)
    for first, second in zip(
        straight[2:], take(training_plan(shards), shards, 2, first=2, backend=backend), strict=True
    ):
        assert_same_batch(first, second)


def test_going_on_with_other_ranks_micro_batches_and_threads_gives_the_same_batches(shards):
    straight = take(training_plan(shards), shards, 5)
    parts = [
        # two ranks of two micro-batches each, from step 3 on
        take(training_plan(shards, rank=rank, world_size=2, micro=8), shards, 4, first=6, reader_threads=3, prefetch=1)
        for rank in (0, 1)
    ]
    for step in (3, 4):
        of_step = [part for rank in parts for part in rank if part.step == step]
        assert_same_batch(straight[step], join(of_step))


def test_every_sample_comes_once_per_epoch_though_batches_straddle_epochs(shards):
    batches = take(training_plan(shards), shards, 6)  # 192 = 4 epochs of 48
    seen = torch.cat([batch.sample for batch in batches]).view(4, 48)
    assert (seen.sort(dim=1).values == torch.arange(48)).all()
    assert not torch.equal(seen[0], seen[1])


def test_steps_differ_in_views_actions_and_masks_though_they_share_a_plan(shards):
    first, second = take(training_plan(shards), shards, 2)
    assert not torch.equal(first.action, second.action)
    assert not torch.equal(first.context.offsets, second.context.offsets)
    assert first.target.total != second.target.total


def test_another_seed_gives_other_samples_views_actions_and_masks(shards):
    (first,), (second,) = take(training_plan(shards), shards, 1), take(training_plan(shards, seed=1), shards, 1)
    assert not torch.equal(first.sample, second.sample) and not torch.equal(first.action, second.action)
    assert not torch.equal(first.context.offsets, second.context.offsets)
    assert not torch.equal(first.crop_window, second.crop_window)


def test_the_dali_loader_gives_the_twins_batch_with_pixels_close(shards):
    fast, plain = (take(training_plan(shards), shards, 2, backend=backend) for backend in ("dali", "torch"))
    for batches in zip(fast, plain, strict=True):
        assert_twins(*batches)


def assert_twins(fast: Batch, plain: Batch) -> None:
    """Everything but the pixels is the same; pixels are close."""
    for name, mine in flat(fast).items():
        other = flat(plain)[name]
        if not name.endswith("_view"):
            assert torch.equal(mine, other) if isinstance(mine, torch.Tensor) else mine == other, name
    for view in ("source_view", "target_view"):
        pixels = [denormalize_view(getattr(batch, view)).int() for batch in (fast, plain)]
        difference = (pixels[0] - pixels[1]).abs().float()
        # JPEG decoders and antialiased resizing differ by a few grey levels at edges
        assert difference.mean() < 1.0 and difference.quantile(0.99) <= 12


def test_a_source_with_a_place_of_its_own_is_the_same_on_both_loaders(shards):
    views = ViewConfig(size=32, source_crop=(0.2, 0.8), source_flip_probability=0.5)
    fast, plain = (
        take(training_plan(shards, views=views), shards, 2, backend=backend) for backend in ("dali", "torch")
    )
    for batches in zip(fast, plain, strict=True):
        assert_twins(*batches)
    shared = take(training_plan(shards), shards, 2)
    for batch, without in zip(fast, shared, strict=True):
        assert batch.action.shape[1] == 12 and torch.equal(batch.action[:, :7], without.action)
        # the target does not notice, the source does
        assert torch.equal(batch.target_view, without.target_view)
        assert not torch.equal(batch.source_view, without.source_view)
        assert (batch.source_window[:, 2:] <= batch.crop_window[:, 2:]).all()
        assert set(batch.action[:, 11].tolist()) == {0.0, 1.0}


def test_keys_and_labels_belong_to_their_pixels(shards):
    (batch,) = take(training_plan(shards), shards, 1)
    for key, sample, label in zip(batch.key, batch.sample.tolist(), batch.label.tolist(), strict=True):
        assert key == f"{sample:04}" and label == sample % 3


def test_normalizing_loses_nothing():
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(denormalize_view(normalize_view(pixels)), pixels)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_evaluation_gives_each_sample_once_and_stops(shards, backend):
    plan = EvaluationPlan(views=VIEWS, grid=8, samples=np.arange(20, 48), micro_batch_size=12)
    loader = build_loader(plan, shards, settings(backend), torch.device("cpu"))
    batches = list(loader)
    loader.close()
    assert [len(batch.key) for batch in batches] == [12, 12, 4]
    assert torch.cat([batch.sample for batch in batches]).tolist() == list(range(20, 48))
    assert all((batch.action == 0).all() and torch.equal(batch.source_view, batch.target_view) for batch in batches)
    assert all(batch.context.longest == 64 and batch.target.total == 64 * len(batch.key) for batch in batches)


@pytest.mark.parametrize("backend", ["dali", "torch"])
@pytest.mark.parametrize("damage", ["truncated", "html"])
def test_an_undecodable_image_is_named_with_shard_and_key(tmp_path, backend, damage):
    image = encode(photograph("coffee.png")[:80, :80])
    bad = image[: len(image) // 3] if damage == "truncated" else b"<html>not found</html>"
    write_tar(tmp_path / "bad.tar", [("a.jpg", image), ("b.jpg", bad), ("c.jpg", image)])
    shards = open_shards(str(tmp_path / "bad.tar"))
    plan = EvaluationPlan(views=VIEWS, grid=8, samples=np.arange(3), micro_batch_size=3)
    loader = build_loader(plan, shards, settings(backend), torch.device("cpu"))
    with pytest.raises(ShardError, match=r"bad\.tar") as caught:
        next(loader)
    assert "sample 'b'" in str(caught.value) and "cannot decode" in str(caught.value)
    loader.close()
