"""Shards that are removed or changed while a run reads them."""

import shutil
from pathlib import Path

import pytest
import torch

from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import LoaderConfig, MaskConfig
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.loader import Loader, build_loader
from iwm_fast.pipelines.sampling.batch_plan import SampleStream, TrainingPlan
from iwm_fast.pipelines.sampling.shuffle import SampleOrder
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.operations.blur import Blur

BACKENDS = ["dali", "torch"]


@pytest.fixture
def shards(tiny_shards, tmp_path) -> ShardSet:
    shutil.copytree(tiny_shards.folder, tmp_path / "shards")
    return open_shards(str(tmp_path / "shards"))


def loader_of(shards: ShardSet, backend: str, max_bad: float = 0.0) -> Loader:
    # A shuffle window of one shard reads the shards one after the other, so that some are opened late.
    stream = SampleStream(
        order=SampleOrder([len(shard.keys) for shard in shards.shards], 0, 1),
        global_batch_size=4, micro_batch_size=4, rank=0, world_size=1,
    )  # fmt: skip
    plan = TrainingPlan(
        views=ViewConfig(size=16, blur=Blur(sigma=(0.1, 1.0))), mask=MaskConfig(), seed=0, grid=4, stream=stream
    )
    settings = LoaderConfig(
        loader=backend, reader_threads=2, loader_threads=1, prefetch=1, read_ahead=1,
        max_bad_samples=max_bad,
    )  # fmt: skip
    return build_loader(plan, shards, settings, torch.device("cpu"))


def last_shard(shards: ShardSet) -> Path:
    """Return the shard that the first epoch reads last."""
    samples = SampleOrder([len(shard.keys) for shard in shards.shards], 0, 1).samples_at(torch.tensor([47]).numpy())
    (number,), _ = shards.locate(samples)
    return Path(shards.shards[number].path)


def epochs(loader: Loader, count: int = 3) -> list[Batch]:
    try:
        return [next(loader) for _ in range(12 * count)]
    finally:
        loader.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_removed_shard_is_named_together_with_the_sample(shards, backend):
    loader, path = loader_of(shards, backend), last_shard(shards)
    next(loader)
    path.unlink()
    with pytest.raises(FileNotFoundError) as caught:
        epochs(loader)
    assert any(str(path) in note and "while reading sample" in note for note in caught.value.__notes__)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_open_shard_may_be_removed(shards, backend):
    loader = loader_of(shards, backend)
    batches = [next(loader) for _ in range(12)]  # one epoch, in which all shards are opened
    for shard in shards.shards:
        Path(shard.path).unlink()
    assert len(batches + epochs(loader, 1)) == 24


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("change", [lambda content: content[: len(content) // 2], lambda content: content + bytes(512)])
def test_a_shard_whose_size_has_changed_is_named(shards, backend, change):
    loader, path = loader_of(shards, backend), last_shard(shards)
    next(loader)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ShardError, match="changed since it was indexed") as caught:
        epochs(loader)
    assert caught.value.shard == str(path)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_overwritten_shard_counts_as_bad_samples_up_to_the_limit(shards, backend, caplog):
    loader, path = loader_of(shards, backend, max_bad=100.0), last_shard(shards)
    next(loader)
    path.write_bytes(bytes(path.stat().st_size))
    # Some batches have all samples in this shard, so that none of them can replace a bad one.
    with pytest.raises(ShardError, match=r"no other sample can replace it.*iwm shards check") as caught:
        epochs(loader)
    assert caught.value.shard == str(path)
    loader = loader_of(shards, backend, max_bad=2.0)
    with pytest.raises(ShardError, match=r"bad sample 3 and runtime.max_bad_samples = 2 allows 2"):
        epochs(loader)
    assert any(f"cannot decode {path}:" in record.getMessage() for record in caplog.records)
