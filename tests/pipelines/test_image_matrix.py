"""Both loaders and `iwm shards check` agree on every kind of image file: the same picture, or bad for all of them.

The square that an evaluation takes from the images of the matrix is as large as the view, so that nothing is resized
and pixels can be compared one by one.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.image_matrix import HEIGHT, all_files, base_pixels, randomly_damaged
from fixtures.tar_files import encode, write_tar
from iwm_fast.pipelines.batch import Batch
from iwm_fast.pipelines.config import IMAGENET, LoaderConfig
from iwm_fast.pipelines.errors import UndecodableImageError
from iwm_fast.pipelines.image_header import probe
from iwm_fast.pipelines.loader import build_loader
from iwm_fast.pipelines.sampling.batch_plan import EvaluationPlan
from iwm_fast.pipelines.storage.shard_set import ShardSet, open_shards
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.image_decoding import decode_image
from iwm_fast.pipelines.transforms.normalization import denormalize_view
from iwm_fast.pipelines.validate import validate_shard

# Damaged TIFFs make Pillow warn; broken images are what these tests are about.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

CONTAINERS = ("jpeg", "png", "webp", "bmp", "pnm", "tiff", "other")
# Accepted containers whose pixels have no known range of brightness, or that Pillow cannot read.
NO_RANGE = {
    f"tiff: {name}" for name in ("I", "F", "F tiff_lzw", "gray 16 bits signed", "gray 8 bits signed", "gray 32 bits",
    "gray 64 bits", "gray half", "gray double", "rgb float")
} | {"pnm: pam", "pnm: float", "pnm: float rgb", "bmp: run lengths with a jump"}  # fmt: skip
LONG_AGO_NS = 1_700_000_000 * 10**9


def shard_of(files: dict[str, bytes], path: Path) -> ShardSet:
    write_tar(path, [(f"{number:04}.jpg", content) for number, content in enumerate(files.values())])
    # The check waits until a shard is old enough for its index to be stored.
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return open_shards(str(path))


def evaluation_of(shards: ShardSet) -> EvaluationPlan:
    return EvaluationPlan(
        views=ViewConfig(size=HEIGHT), grid=4, samples=np.arange(shards.num_samples), micro_batch_size=8,
        leaves_out_bad_samples=True,
    )  # fmt: skip


def batches(plan: EvaluationPlan, shards: ShardSet, backend: str, max_bad_samples: float = 1e9) -> Iterator[Batch]:
    settings = LoaderConfig(
        loader=backend, reader_threads=2, loader_threads=1, prefetch=2, max_bad_samples=max_bad_samples
    )
    loader = build_loader(plan, shards, settings, torch.device("cpu"))
    try:
        yield from loader
    finally:
        loader.close()


def pictures(shards: ShardSet, backend: str) -> dict[int, torch.Tensor]:
    """Return the pixels of all images that a loader renders, by number of the sample."""
    rendered = {}
    for batch in batches(evaluation_of(shards), shards, backend):
        pixels = denormalize_view(batch.source_view, IMAGENET).int()
        for scheduled, sample, picture in zip(batch.scheduled_sample, batch.sample, pixels, strict=True):
            if sample == scheduled:
                rendered[int(sample)] = picture
    return rendered


@pytest.mark.parametrize("container", CONTAINERS)
def test_loaders_and_check_agree_on_every_file(container, tmp_path, caplog):
    files, path = all_files(container) | {"replacement": encode(base_pixels())}, tmp_path / "matrix.tar"
    names, shards = list(files), shard_of(files, path)
    with caplog.at_level(logging.WARNING):
        by_dali = pictures(shards, "dali")
    left_out = {name for number, name in enumerate(names) if number not in by_dali}
    for number, name in enumerate(names):
        assert (name in left_out) == (f"cannot decode {path}:{number:04} (" in caplog.text), f"{name} must be named"
    by_torch = pictures(shards, "torch")
    assert {names[number] for number in set(by_dali) ^ set(by_torch)} == set(), "drawn by one loader only"
    difference = {names[number]: int((by_dali[number] - by_torch[number]).abs().max()) for number in by_dali}
    # This one is larger than the view, and the loaders' ways to resize differ.
    resized = {"jpeg: arithmetic"}
    assert {name: levels for name, levels in difference.items() if levels > (3 if name in resized else 1)} == {}
    assert {names[int(bad.key)] for bad in validate_shard(str(path)).bad} == left_out


@pytest.mark.parametrize("num_files", [300, pytest.param(3000, marks=pytest.mark.slow)])
def test_loaders_agree_on_randomly_damaged_files(num_files, tmp_path):
    files = randomly_damaged(num_files, seed=num_files) | {"replacement": encode(base_pixels())}
    names, shards = list(files), shard_of(files, tmp_path / "damaged.tar")
    by_dali, by_torch = pictures(shards, "dali"), pictures(shards, "torch")
    assert {names[number] for number in set(by_dali) ^ set(by_torch)} == set(), "drawn by one loader only"
    differing = [names[number] for number in by_dali if (by_dali[number] - by_torch[number]).abs().max() > 1]
    assert differing == [] and num_files / 4 < len(by_dali) < num_files


@pytest.mark.parametrize("container", CONTAINERS)
def test_the_header_has_the_size_of_the_upright_picture(container):
    for name, content in all_files(container).items():
        try:
            pixels = decode_image(content)
        except UndecodableImageError:
            continue
        assert probe(content).upright_size == tuple(pixels.shape[1::-1]), name


def test_intact_files_are_rendered_and_damaged_ones_are_not():
    files = {name: content for container in CONTAINERS for name, content in all_files(container).items()}
    refused = set()
    for name, content in files.items():
        try:
            decode_image(content)
        except UndecodableImageError:
            refused.add(name)
    assert len(files) > 350 and {name for name in refused if "damage" not in name} == {
        name for name in files if name.startswith("other") or name in NO_RANGE
    }
    assert all(name in refused for name in files if "cut in half" in name)


def test_an_image_that_only_pillow_decodes_is_named_once_and_used(tmp_path, caplog):
    files = all_files("png")
    files = {"good": files["png: RGB"], "rows": files["png: damage: rows missing"]}
    shards = shard_of(files, tmp_path / "s.tar")
    plan = replace(evaluation_of(shards), samples=np.array([0, 1] * 8))
    drawn = [batch.sample.tolist() for batch in batches(plan, shards, "dali", max_bad_samples=0.0)]
    assert drawn == [[0, 1] * 4] * 2
    assert [record.getMessage() for record in caplog.records] == [
        f"DALI cannot decode {tmp_path}/s.tar:0001; Pillow decodes it instead (Failed to decode sample #0)"
    ]


def test_batches_in_which_only_pillow_decodes_any_image_are_used(tmp_path, caplog):
    shards = shard_of({"rows": all_files("png")["png: damage: rows missing"]}, tmp_path / "s.tar")
    plan = replace(evaluation_of(shards), samples=np.zeros(9, np.int64))
    drawn = [batch.sample.tolist() for batch in batches(plan, shards, "dali", max_bad_samples=0.0)]
    assert drawn == [[0] * 8, [0]] and len(caplog.records) == 1


@pytest.mark.parametrize("name", ["CMYK", "planar rgb", "cmyk jpeg", "LA", "rgb 16 bits"])
def test_decoders_write_no_lines_about_good_tiffs(name, tmp_path, capfd):
    shards = shard_of({name: all_files("tiff")[f"tiff: {name}"]}, tmp_path / "s.tar")
    assert len(pictures(shards, "dali")) == 1
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
