"""The feature cache: features are extracted once; damaged, incomplete or stale ones are never returned."""

import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.launchers import CHILD_ENVIRONMENT, free_port
from fixtures.paths import WORKERS
from fixtures.tar_files import digests, encode, write_tar
from fixtures.tinted_shards import pretrain_on_tinted_shards, write_tinted_shard
from fixtures.tiny_pretraining import tiny_run
from iwm_fast import world_model
from iwm_fast.config.evaluation import EvalDataConfig
from iwm_fast.evals.datasets import LabelledSamples, evenly_spaced, result_name
from iwm_fast.evals.probing.extraction import encode_batches, extract_features
from iwm_fast.evals.probing.feature_cache import FEATURES_FILE, FeatureCache
from iwm_fast.pipelines.annotations.labels import read_labels
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.runtime.distributed import single_process

WORKER = WORKERS / "ranks_features.py"
ALONE = single_process("cpu")


@pytest.fixture
def model(tiny_shards, tmp_path):
    return world_model.build_untrained(tiny_run(tiny_shards, tmp_path / "run", loader="torch"))


@pytest.fixture
def images(tmp_path) -> LabelledSamples:
    """Return 70 labelled images, which are a full batch and a smaller one."""
    return labelled(write_tinted_shard(tmp_path / "images.tar", 70, 0))


@pytest.fixture
def run_folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def labelled(spec: str, count: int = 70, image: str = "") -> LabelledSamples:
    shards = open_shards(spec, image)
    return LabelledSamples(
        shards=shards, labels=read_labels(shards, "cls"), samples=evenly_spaced(shards.num_samples, count)
    )


def other_weights(model):
    return world_model.build_untrained(replace(model.config, seed=model.config.seed + 1))


def sets(run_folder: Path) -> list[Path]:
    """Return the folders of complete features."""
    return sorted(path for path in (run_folder / "features").iterdir() if not path.name.startswith("."))


def test_selected_samples_are_evenly_spaced_over_the_set():
    assert evenly_spaced(10, 5).tolist() == [0, 2, 4, 6, 8] and evenly_spaced(3, 10).tolist() == [0, 1, 2]
    assert np.diff(evenly_spaced(1000, 64)).max() <= 16


def test_the_name_of_a_result_contains_the_label():
    assert result_name("knn", EvalDataConfig()) == "knn"
    assert result_name("linear", EvalDataConfig(label="json.a b.c/d")) == "linear_json.a%20b.c%2Fd"


def test_features_are_the_outputs_of_the_encoder_in_order_of_samples(model, images, run_folder):
    cache = FeatureCache(run_folder, [model], ALONE)
    tokens = torch.cat(list(encode_batches(model, images.shards, images.samples, "tokens")))
    pooled = cache.rows(model, images, "pooled")
    assert tokens.shape == (70, 16, 32) and tokens.dtype == torch.float16
    assert pooled.dtype == np.float32 and np.array_equal(pooled, extract_features(model, images).features.numpy())
    np.testing.assert_allclose(pooled, tokens.float().mean(dim=1).numpy(), atol=1e-3)
    assert np.array_equal(cache.rows(model, images, "tokens"), tokens.numpy())
    few = replace(images, samples=images.samples[::-7])
    np.testing.assert_allclose(cache.rows(model, few, "pooled"), pooled[::-7], atol=1e-5)
    assert len(np.unique(pooled, axis=0)) == 70 and not pooled.flags.writeable


def test_cached_features_are_not_extracted_again(model, images, run_folder):
    rows = np.array(FeatureCache(run_folder, [model], ALONE).rows(model, images, "pooled"))
    Path(images.shards.shards[0].path).unlink()
    assert np.array_equal(FeatureCache(run_folder, [model], ALONE).rows(model, images, "pooled"), rows)
    with pytest.raises(FileNotFoundError, match=r"images\.tar"):
        FeatureCache(run_folder, [model], ALONE).rows(model, images, "tokens")


def test_the_digest_depends_on_everything_that_determines_features(model, images, run_folder, tmp_path):
    other = other_weights(model)
    cache = FeatureCache(run_folder, [model, other], ALONE)
    views, encoder = model.config.views, model.config.model.encoder
    larger = replace(model, config=replace(model.config, views=replace(views, size=32)))
    heads = replace(encoder, num_heads=4)
    more_heads = replace(model, config=replace(model.config, model=replace(model.config.model, encoder=heads)))
    with_dali = replace(model, config=replace(model.config, runtime=replace(model.config.runtime, loader="dali")))
    few = replace(images, samples=images.samples[:9])
    elsewhere = labelled(write_tinted_shard(tmp_path / "others.tar", 70, 100))
    copied = labelled(write_tinted_shard(tmp_path / "copy.tar", 70, 0))
    first = cache.spec(model, images, "pooled")
    assert cache.spec(model, copied, "pooled").digest == first.digest
    different = [cache.spec(*arguments) for arguments in (
        (other, images, "pooled"), (model, few, "pooled"), (model, elsewhere, "pooled"), (model, images, "tokens"),
        (model, images, "pooled", 2),
    )]  # fmt: skip
    different += [replace(first, model=changed) for changed in (larger, more_heads, with_dali)]
    assert len({spec.digest for spec in (first, *different)}) == 9


def test_two_images_of_a_sample_with_equal_sizes_have_features_of_their_own(model, run_folder, tmp_path):
    left, right = (np.full((8, 8, 3), value, np.uint8) for value in (0, 200))
    members = [("0.left.bmp", encode(left, "BMP")), ("0.right.bmp", encode(right, "BMP")), ("0.cls", b"0")]
    write_tar(tmp_path / "stereo.tar", members)
    cache = FeatureCache(run_folder, [model], ALONE)
    rows = [
        np.array(cache.rows(model, labelled(str(tmp_path / "stereo.tar"), image=f"{side}.bmp"), "pooled"))
        for side in ("left", "right")
    ]
    assert not np.allclose(*rows)


def flip_a_bit(folder: Path) -> None:
    with (folder / FEATURES_FILE).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def cut(folder: Path) -> None:
    os.truncate(folder / FEATURES_FILE, (folder / FEATURES_FILE).stat().st_size - 1)


def change_key(folder: Path) -> None:
    key = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(key | {"size": 99}))


DAMAGE = {
    "flipped bit": flip_a_bit,
    "missing end": cut,
    "missing manifest": lambda folder: (folder / "manifest.json").unlink(),
    "missing rows": lambda folder: (folder / FEATURES_FILE).unlink(),
    "changed key": change_key,
    "garbage": lambda folder: (folder / FEATURES_FILE).write_bytes(b"x" * 100),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_features_are_extracted_again_with_one_warning(model, images, run_folder, caplog, damage):
    rows = np.array(FeatureCache(run_folder, [model], ALONE).rows(model, images, "pooled"))
    (folder,) = sets(run_folder)
    DAMAGE[damage](folder)
    assert np.array_equal(FeatureCache(run_folder, [model], ALONE).rows(model, images, "pooled"), rows)
    assert caplog.text.count(f"{folder} are damaged") == 1
    caplog.clear()
    FeatureCache(run_folder, [model], ALONE).rows(model, images, "pooled")
    assert "damaged" not in caplog.text


def test_a_bad_image_is_named_and_no_features_are_written(model, run_folder, tmp_path):
    images = labelled(write_tinted_shard(tmp_path / "bad.tar", 70, 0, bad=66))
    with pytest.raises(ShardError, match=r"bad\.tar: sample '066': cannot decode the image.*iwm shards check"):
        FeatureCache(run_folder, [model], ALONE).rows(model, images, "tokens")
    assert [path.name for path in (run_folder / "features").iterdir()] == [".lock"]


@pytest.mark.parametrize("weight", [float("nan"), 1e30])
def test_features_that_are_not_finite_are_refused_and_not_written(model, images, run_folder, weight):
    model.encoder.norm.weight.data[3] = weight
    with pytest.raises(FloatingPointError, match=r"has features that are not finite.*checkpoint=STEP"):
        FeatureCache(run_folder, [model], ALONE).rows(model, images, "tokens")
    assert [path.name for path in (run_folder / "features").iterdir()] == [".lock"]


def test_features_of_other_encoders_are_removed(model, images, run_folder, caplog):
    caplog.set_level(logging.INFO)
    control, later = other_weights(model), other_weights(other_weights(model))
    cache = FeatureCache(run_folder, [model, control], ALONE)
    for network in (model, control):
        cache.rows(network, images, "pooled")
    before = sets(run_folder)
    kept = np.array(FeatureCache(run_folder, [control, later], ALONE).rows(control, images, "pooled"))
    assert len(before) == 2 and len(sets(run_folder)) == 1 and set(sets(run_folder)) < set(before)
    assert np.array_equal(kept, extract_features(control, images).features.numpy())
    assert f"removed 1 sets of features of other checkpoints from {run_folder / 'features'}" in caplog.text


def test_the_cache_waits_for_another_process_that_holds_the_lock(model, images, run_folder, caplog):
    caplog.set_level(logging.INFO)
    cache, results = FeatureCache(run_folder, [model], ALONE), []
    with (run_folder / "features" / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: results.append(cache.rows(model, images, "pooled")))
        waiting.start()
        while "waiting for another process" not in caplog.text:
            time.sleep(0.01)
        assert not results and not sets(run_folder)
    waiting.join(60)
    assert results[0].shape == (70, 32)


def test_too_little_disk_space_is_refused_with_the_size_needed(model, images, run_folder):
    cache = FeatureCache(run_folder, [model], ALONE)
    spec = cache.spec(model, images, "tokens")
    size = 70 * 16 * 32 * 2 / 1e9
    cache.check_disk_space([spec, spec], size)
    message = rf"max_cache_gb must be at least {2 * size:.4g}, .*{run_folder}.*max_train_samples, got"
    with pytest.raises(ValueError, match=message):
        cache.check_disk_space([spec, cache.spec(model, replace(images, samples=images.samples[::-1]), "tokens")], size)
    encoder = replace(model.config.model.encoder)
    # Settings refuse such a width; only its size matters here.
    object.__setattr__(encoder, "dim", 10**12)
    giant = replace(model, config=replace(model.config, model=replace(model.config.model, encoder=encoder)))
    with pytest.raises(ValueError, match=r"need 2\.24e\+06 GB more in .*; free disk space or lower max_train_sam"):
        cache.check_disk_space([replace(spec, model=giant)], 1e9)
    assert sets(run_folder) == []


def environment(rank: int, port: str) -> dict[str, str]:
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return os.environ | variables | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | CHILD_ENVIRONMENT


def start_ranks(*arguments: str) -> list[subprocess.Popen]:
    command, port = [sys.executable, str(WORKER), *arguments], free_port()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen(command, env=environment(rank, port), **pipes) for rank in range(2)]


@pytest.mark.multi_rank
@pytest.mark.slow
def test_two_ranks_write_the_same_features_and_results_as_one(tmp_path):
    run_folder = pretrain_on_tinted_shards(tmp_path, num_train=150, num_val=66)
    twin = shutil.copytree(run_folder, tmp_path / "twin")
    # Three batches of training images: in the second round one rank has none.
    ranks = start_ranks(str(run_folder))
    printed = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert printed[0][0] == printed[1][0] != ""
    alone = subprocess.run(
        [sys.executable, str(WORKER), str(twin)], capture_output=True, text=True, check=True,
        env=os.environ | CHILD_ENVIRONMENT,
    )  # fmt: skip
    assert alone.stdout == printed[0][0]
    files = [{path.name: digests(path) for path in sets(folder)} for folder in (run_folder, twin)]
    assert len(files[0]) == 8 and files[0] == files[1]


@pytest.mark.multi_rank
@pytest.mark.slow
def test_features_of_killed_ranks_are_not_used_and_are_removed(tmp_path):
    run_folder = pretrain_on_tinted_shards(tmp_path, num_train=150, num_val=66)
    for _ in range(2):
        ranks = start_ranks(str(run_folder), "kill")
        for rank in ranks:
            rank.communicate(timeout=300)
        assert ranks[0].returncode == -signal.SIGKILL
        assert [path.name.startswith(".unfinished-") for path in (run_folder / "features").iterdir()].count(True) == 1
        assert sets(run_folder) == []
    model = world_model.load(run_folder)
    images = labelled(str(tmp_path / "train.tar"), 150)
    rows = FeatureCache(run_folder, [model], ALONE).rows(model, images, "pooled")
    assert np.array_equal(rows, extract_features(model, images).features.numpy())
    assert not [path for path in (run_folder / "features").iterdir() if path.name.startswith(".unfinished-")]
