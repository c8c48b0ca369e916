import dataclasses

import numpy as np
import pytest
import torch

from fixtures.tar_files import encode, photograph, write_tar
from iwm_fast.pipelines.batch import Batch, RaggedIndex
from iwm_fast.pipelines.config import IMAGENET, LoaderConfig, MaskConfig
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.loader import build_loader
from iwm_fast.pipelines.sampling.batch_plan import EvaluationPlan, SampleStream, TrainingPlan
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.transforms.composition import Draws, ViewConfig
from iwm_fast.pipelines.transforms.normalization import denormalize_view, normalize_view
from iwm_fast.pipelines.transforms.operations.crop import Crop
from iwm_fast.pipelines.transforms.operations.flip import Flip

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
    return LoaderConfig(loader=backend, **{"reader_threads": 2, "loader_threads": 1, "prefetch": 2} | changes)


def take(plan, shards: ShardSet, count: int, first: int = 0, **changes) -> list[Batch]:
    loader = build_loader(plan, shards, settings(**changes), torch.device("cpu"), first=first)
    try:
        return [next(loader) for _ in range(count)]
    finally:
        loader.close()


def flatten_batch(batch: Batch) -> dict[str, torch.Tensor | tuple | int]:
    """Return all values of a batch by dotted name."""
    values = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, RaggedIndex):
            values |= {f"{field.name}.{name}": item for name, item in vars(value).items()}
        elif isinstance(value, Draws):
            values |= flatten_draws(value, field.name)
        else:
            values[field.name] = value
    return values


def flatten_draws(draws, prefix: str) -> dict[str, torch.Tensor]:
    values = {}
    for name, value in (draws if isinstance(draws, dict) else vars(draws)).items():
        is_array = isinstance(value, np.ndarray)
        path = f"{prefix}.{name}"
        values |= {path: torch.from_numpy(value)} if is_array else flatten_draws(value, path)
    return values


def assert_same_batch(first: Batch, second: Batch) -> None:
    first_values, second_values = flatten_batch(first), flatten_batch(second)
    for name, value in first_values.items():
        other = second_values[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name


def join(batches: list[Batch]) -> Batch:
    """Concatenate the micro-batches of a step in the order of their slots."""
    batches = sorted(batches, key=lambda batch: int(batch.slot[0]))
    joined = {
        name: torch.cat([getattr(batch, name) for batch in batches])
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
    key = tuple(name for batch in batches for name in batch.key)
    indexes = {name: join_indexes([getattr(batch, name) for batch in batches]) for name in ("context", "target")}
    return Batch(
        **joined, **indexes, key=key, step=batches[0].step, draws=join_draws([batch.draws for batch in batches])
    )


def join_draws(parts: list) -> object:
    """Concatenate nested dataclasses and dicts of arrays."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    if isinstance(first, dict):
        return {name: np.concatenate([part[name] for part in parts]) for name in first}
    return type(first)(**{name: join_draws([getattr(part, name) for part in parts]) for name in vars(first)})


def join_indexes(indexes: list[RaggedIndex]) -> RaggedIndex:
    images = np.cumsum([0] + [len(index.offsets) - 1 for index in indexes])
    lengths = torch.cat([index.offsets.diff() for index in indexes])
    return RaggedIndex(
        patch=torch.cat([index.patch for index in indexes]),
        row=torch.cat([index.row + 64 * int(image) for index, image in zip(indexes, images[:-1], strict=True)]),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)]),
        lengths=tuple(length for index in indexes for length in index.lengths),
        total=indexes[0].total,
    )


@pytest.fixture(scope="module")
def shards(tiny_shards) -> ShardSet:
    return open_shards(tiny_shards.pattern)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_batches_are_bit_equal_for_any_ranks_and_micro_batches(shards, backend):
    single = take(training_plan(shards), shards, 3, backend=backend)
    two_ranks = [
        take(training_plan(shards, rank=rank, world_size=2, micro=16), shards, 3, backend=backend) for rank in (0, 1)
    ]
    accumulated = take(training_plan(shards, micro=8), shards, 12, backend=backend)
    for step, batch in enumerate(single):
        assert_same_batch(batch, join([ranks[step] for ranks in two_ranks]))
        assert_same_batch(batch, join(accumulated[4 * step : 4 * step + 4]))


def test_threads_and_prefetch_do_not_change_a_batch(shards):
    reference = take(training_plan(shards), shards, 3)
    # Without a GPU, images are decoded on the CPU, whatever `decode` is.
    other = take(training_plan(shards), shards, 3, reader_threads=3, loader_threads=2, prefetch=1, decode="cpu")
    for first, second in zip(reference, other, strict=True):
        assert_same_batch(first, second)


@pytest.mark.parametrize(
    ("device", "changes"), [("cpu", {}), ("cuda", {"decode": "cpu"}), ("cuda", {"backend": "torch"})]
)
@pytest.mark.parametrize("setting", [{"hw_decoder_load": 0.5}, {"decoder_preallocate": (80, 60)}])
def test_settings_of_the_gpus_decoder_are_refused_where_it_does_not_decode(shards, device, changes, setting):
    with pytest.raises(ValueError, match=r"runtime\.\w+ must be unset unless DALI decodes on a GPU"):
        build_loader(training_plan(shards), shards, settings(**changes, **setting), torch.device(device, 0))


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_starting_in_the_middle_gives_the_batches_of_an_uninterrupted_run(shards, backend):
    uninterrupted = take(training_plan(shards), shards, 4, backend=backend)
    for first, second in zip(
        uninterrupted[2:], take(training_plan(shards), shards, 2, first=2, backend=backend), strict=True
    ):
        assert_same_batch(first, second)


def test_resuming_with_other_ranks_and_threads_gives_the_same_batches(shards):
    uninterrupted = take(training_plan(shards), shards, 5)
    batches = [
        # Two ranks with two micro-batches per step start at step 3.
        take(training_plan(shards, rank=rank, world_size=2, micro=8), shards, 4, first=6, reader_threads=3, prefetch=1)
        for rank in (0, 1)
    ]
    for step in (3, 4):
        of_step = [batch for rank in batches for batch in rank if batch.step == step]
        assert_same_batch(uninterrupted[step], join(of_step))


def test_every_sample_comes_once_per_epoch_if_batches_span_two_epochs(shards):
    batches = take(training_plan(shards), shards, 6)  # 192 = 4 epochs of 48
    seen = torch.cat([batch.sample for batch in batches]).view(4, 48)
    assert (seen.sort(dim=1).values == torch.arange(48)).all()
    assert not torch.equal(seen[0], seen[1])


def test_steps_of_a_plan_differ_in_views_actions_and_masks(shards):
    first, second = take(training_plan(shards), shards, 2)
    assert not torch.equal(first.action, second.action)
    assert not torch.equal(first.context.offsets, second.context.offsets)
    assert first.target.total != second.target.total


def test_another_seed_gives_other_samples_views_actions_and_masks(shards):
    (first,), (second,) = take(training_plan(shards), shards, 1), take(training_plan(shards, seed=1), shards, 1)
    assert not torch.equal(first.sample, second.sample) and not torch.equal(first.action, second.action)
    assert not torch.equal(first.context.offsets, second.context.offsets)
    assert not torch.equal(first.crop_window, second.crop_window)


def test_the_dali_loader_gives_the_batch_of_the_torch_loader(shards):
    fast, plain = (take(training_plan(shards), shards, 2, backend=backend) for backend in ("dali", "torch"))
    for batches in zip(fast, plain, strict=True):
        assert_close(*batches)


def assert_close(fast: Batch, plain: Batch) -> None:
    """Check that pixels are close and everything else is equal."""
    for name, value in flatten_batch(fast).items():
        other = flatten_batch(plain)[name]
        if not name.endswith("_view"):
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name
    for view in ("source_view", "target_view"):
        pixels = [denormalize_view(getattr(batch, view), IMAGENET).int() for batch in (fast, plain)]
        difference = (pixels[0] - pixels[1]).abs().float()
        # Decoding and resizing differ by up to one grey level each, which jitter enlarges.
        assert difference.mean() < 0.5 and difference.quantile(0.99) <= 2 and difference.max() <= 6


def test_a_further_source_crop_is_the_same_with_both_loaders(shards):
    views = ViewConfig(size=32, crop=Crop(source_scale=(0.2, 0.8)), flip=Flip(source_probability=0.5))
    fast, plain = (
        take(training_plan(shards, views=views), shards, 2, backend=backend) for backend in ("dali", "torch")
    )
    for batches in zip(fast, plain, strict=True):
        assert_close(*batches)
    shared = take(training_plan(shards), shards, 2)
    for batch, shared_batch in zip(fast, shared, strict=True):
        assert batch.action.shape[1] == 12 and torch.equal(batch.action[:, :7], shared_batch.action)
        # The crop changes the source view and leaves the target view as it was.
        assert torch.equal(batch.target_view, shared_batch.target_view)
        assert not torch.equal(batch.source_view, shared_batch.source_view)
        assert (batch.source_window[:, 2:] <= batch.crop_window[:, 2:]).all()
        assert set(batch.action[:, 11].tolist()) == {0.0, 1.0}


def test_keys_and_labels_belong_to_their_pixels(shards):
    (batch,) = take(training_plan(shards), shards, 1)
    for key, sample, label in zip(batch.key, batch.sample.tolist(), batch.label.tolist(), strict=True):
        assert key == f"{sample:04}" and label == sample % 3


def test_normalizing_is_invertible():
    pixels = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(denormalize_view(normalize_view(pixels, IMAGENET), IMAGENET), pixels)


@pytest.mark.parametrize("backend", ["dali", "torch"])
def test_evaluation_yields_each_sample_once_and_ends(shards, backend):
    plan = EvaluationPlan(views=VIEWS, grid=8, samples=np.arange(20, 48), micro_batch_size=12)
    loader = build_loader(plan, shards, settings(backend), torch.device("cpu"))
    batches = list(loader)
    loader.close()
    assert [len(batch.key) for batch in batches] == [12, 12, 4]
    assert torch.cat([batch.sample for batch in batches]).tolist() == list(range(20, 48))
    assert all((batch.action == 0).all() and torch.equal(batch.source_view, batch.target_view) for batch in batches)
    assert all(set(batch.context.lengths) == {64} and batch.target.total == 64 * len(batch.key) for batch in batches)


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
