"""Segmentation maps of batches: they match the views for all crops and flips."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch

from fixtures.painted_shards import COLOURS, IGNORED, write_painted_shard
from fixtures.tar_files import TinyShards, encode, photograph, write_tar
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.evals.segmentation.masks import MaskReader, count_classes
from iwm_fast.pipelines.config import IMAGENET
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.runtime.distributed import RankInfo
from iwm_fast.training.loaders import evaluation_loader, finetune_loader

RANK_INFO = RankInfo(rank=0, local_rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def shards(tmp_path):
    return open_shards(write_painted_shard(tmp_path / "s.tar", 24, seed=0))


@pytest.fixture
def config(tmp_path):
    config = tiny_run(TinyShards(pattern=str(tmp_path / "s.tar"), folder=tmp_path), tmp_path, loader="torch")
    return replace(config, views=replace(config.views, size=32))


def classes_in(view):
    """Return the class whose colour is nearest to each pixel, and whether the colour is close to it."""
    distance = np.abs(denormalize_view(view, IMAGENET).numpy()[..., None, :].astype(int) - COLOURS.astype(int)).sum(-1)
    return distance.argmin(-1), distance.min(-1) < 60


def read_batches(shards, loader, count, **changes):
    """Return batches of the loader with their maps."""
    settings = {"size": 32, "num_classes": 4, "ignore_index": IGNORED, "num_threads": 2}
    with closing(MaskReader(shards, **settings | changes)) as masks:
        batches = [next(loader) for _ in range(count)]
        waits = [masks.prefetch(batch) for batch in batches]
        pairs = [(batch, wait()) for batch, wait in zip(batches, waits, strict=True)]
    loader.close()
    return pairs


def test_maps_follow_the_crops_and_flips_of_training(shards, config):
    pairs = read_batches(shards, finetune_loader(config, None, shards, RANK_INFO), 3)
    flips = np.concatenate([batch.draws.flip for batch, _ in pairs])
    assert 0 < flips.sum() < len(flips)
    for batch, mask in pairs:
        classes, is_clear = classes_in(batch.source_view)
        is_counted = (mask.numpy() != IGNORED) & is_clear
        assert mask.shape == (16, 32, 32) and is_counted.mean() > 0.8
        # Map and view may differ by a pixel at the border of two colours.
        assert (classes == mask.numpy())[is_counted].mean() > 0.97


def test_maps_follow_the_centre_square_of_validation(shards, config):
    ((batch, mask),) = read_batches(shards, evaluation_loader(config, shards, np.arange(24), RANK_INFO.device), 1)
    classes, is_clear = classes_in(batch.source_view)
    is_counted = (mask.numpy() != IGNORED) & is_clear
    assert (classes == mask.numpy())[is_counted].mean() > 0.97


def test_an_undefined_class_is_reported_with_its_sample(shards, config):
    loader = evaluation_loader(config, shards, np.arange(24), RANK_INFO.device)
    with pytest.raises(ShardError, match="contains class 3, but num_classes is 3; increase num_classes"):
        read_batches(shards, loader, 1, num_classes=3)


def test_classes_are_counted_in_the_training_maps(tmp_path, shards):
    few = open_shards(write_painted_shard(tmp_path / "few.tar", 6, seed=1, classes=3))
    assert count_classes(shards, few, ignore_index=IGNORED, num_threads=2) == 4
    assert count_classes(few, few, ignore_index=IGNORED, num_threads=2) == 3


def test_a_class_that_occurs_only_in_validation_is_reported(tmp_path, shards):
    few = open_shards(write_painted_shard(tmp_path / "few.tar", 6, seed=1, classes=3))
    with pytest.raises(ShardError, match=r"contains class 3, which no training map contains; .* \[0, 1, 2\]"):
        count_classes(few, shards, ignore_index=IGNORED, num_threads=2)
    # With ignore_index=3, class 3 is ignored, but 255 becomes a class.
    with pytest.raises(ShardError, match="contains class 255"):
        count_classes(_without_ignored(tmp_path), shards, ignore_index=3, num_threads=2)


def _without_ignored(tmp_path):
    """Write a shard whose maps have no pixel with the value 255."""
    content, pixels = [], photograph("coffee.png")[:40, :40]
    for number in range(3):
        mask = np.full((40, 40), number, np.uint8)
        content += [(f"{number}.jpg", encode(pixels)), (f"{number}.seg.png", encode(mask, "PNG"))]
    write_tar(tmp_path / "plain.tar", content)
    return open_shards(str(tmp_path / "plain.tar"))


def test_missing_maps_and_maps_without_classes_are_refused(tmp_path, shards):
    bare = open_shards(write_painted_shard(tmp_path / "bare.tar", 3, seed=1, has_masks=False))
    for pair in ((bare, shards), (shards, bare)):
        with pytest.raises(ShardError, match=r"has no segmentation map \(3 of 3 samples"):
            count_classes(*pair, ignore_index=IGNORED, num_threads=2)
    pixels = photograph("coffee.png")[:40, :40]
    write_tar(
        tmp_path / "void.tar", [("a.jpg", encode(pixels)), ("a.png", encode(np.full((40, 40), 255, np.uint8), "PNG"))]
    )
    with pytest.raises(ValueError, match=r"data\.train contain no class besides ignore_index, which is 255"):
        count_classes(open_shards(str(tmp_path / "void.tar")), shards, ignore_index=IGNORED, num_threads=2)
