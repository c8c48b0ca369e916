"""Frozen features on the disk: what the encoder says, once, and nothing that is damaged, half or of another encoder."""

import fcntl
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fixtures.launchers import CHILD
from fixtures.paths import WORKERS
from fixtures.tar_files import digests
from fixtures.tinted_shards import tinted_run, write_tinted
from fixtures.tiny_pretraining import tiny_run
from iwm_fast import world_model
from iwm_fast.config.evaluation import EvalData
from iwm_fast.evals.datasets import Labelled, result_name, spread
from iwm_fast.evals.probing.extraction import encoded, extract_features
from iwm_fast.evals.probing.feature_cache import ROWS, FeatureCache
from iwm_fast.pipelines.annotations.labels import read_labels
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.runtime.distributed import single_process

WORKER = WORKERS / "ranks_features.py"
ALONE = single_process("cpu")


@pytest.fixture
def model(tiny_shards, tmp_path):
    return world_model.untrained(tiny_run(tiny_shards, tmp_path / "run", loader="torch"))


@pytest.fixture
def part(tmp_path) -> Labelled:
    """70 images: a whole block and a part of one."""
    return labelled(write_tinted(tmp_path / "images.tar", 70, 0))


@pytest.fixture
def run_folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def labelled(spec: str, count: int = 70) -> Labelled:
    shards = open_shards(spec)
    return Labelled(shards=shards, labels=read_labels(shards, "cls"), samples=spread(shards.num_samples, count))


def other_weights(model):
    return world_model.untrained(replace(model.config, seed=model.config.seed + 1))


def sets(run_folder: Path) -> list[Path]:
    return sorted(path for path in (run_folder / "features").iterdir() if not path.name.startswith("."))


def test_samples_are_spread_over_the_whole_set():
    assert spread(10, 5).tolist() == [0, 2, 4, 6, 8] and spread(3, 10).tolist() == [0, 1, 2]
    assert np.diff(spread(1000, 64)).max() <= 16


def test_each_label_has_a_result_of_its_own():
    assert result_name("knn", EvalData()) == "knn"
    assert result_name("linear", EvalData(label="json.a b.c/d")) == "linear_json.a%20b.c%2Fd"


def test_rows_are_what_the_encoder_says_of_the_images_in_their_order(model, part, run_folder):
    cache = FeatureCache(run_folder, [model], ALONE)
    tokens = torch.cat(list(encoded(model, part.shards, part.samples, "tokens")))
    pooled = cache.rows(model, part, "pooled")
    assert tokens.shape == (70, 16, 32) and tokens.dtype == torch.float16
    assert pooled.dtype == np.float32 and np.array_equal(pooled, extract_features(model, part).features.numpy())
    np.testing.assert_allclose(pooled, tokens.float().mean(dim=1).numpy(), atol=1e-3)
    assert np.array_equal(cache.rows(model, part, "tokens"), tokens.numpy())
    few = replace(part, samples=part.samples[::-7])
    np.testing.assert_allclose(cache.rows(model, few, "pooled"), pooled[::-7], atol=1e-5)
    assert len(np.unique(pooled, axis=0)) == 70 and not pooled.flags.writeable


def test_what_is_there_is_not_extracted_again(model, part, run_folder):
    rows = np.array(FeatureCache(run_folder, [model], ALONE).rows(model, part, "pooled"))
    Path(part.shards.shards[0].path).unlink()
    assert np.array_equal(FeatureCache(run_folder, [model], ALONE).rows(model, part, "pooled"), rows)
    with pytest.raises(FileNotFoundError, match=r"images\.tar"):
        FeatureCache(run_folder, [model], ALONE).rows(model, part, "tokens")


def test_everything_that_the_rows_follow_from_has_its_place_in_the_digest(model, part, run_folder, tmp_path):
    other = other_weights(model)
    cache = FeatureCache(run_folder, [model, other], ALONE)
    views, encoder = model.config.views, model.config.model.encoder
    larger = replace(model, config=replace(model.config, views=replace(views, size=32)))
    heads = replace(encoder, num_heads=4)
    more_heads = replace(model, config=replace(model.config, model=replace(model.config.model, encoder=heads)))
    with_dali = replace(model, config=replace(model.config, runtime=replace(model.config.runtime, loader="dali")))
    few = replace(part, samples=part.samples[:9])
    elsewhere = labelled(write_tinted(tmp_path / "others.tar", 70, 100))
    copied = labelled(write_tinted(tmp_path / "copy.tar", 70, 0))
    first = cache.spec(model, part, "pooled")
    assert cache.spec(model, copied, "pooled").digest == first.digest
    different = [cache.spec(*one) for one in (
        (other, part, "pooled"), (model, few, "pooled"), (model, elsewhere, "pooled"), (model, part, "tokens"),
    )]  # fmt: skip
    different += [replace(first, model=one) for one in (larger, more_heads, with_dali)]
    assert len({one.digest for one in (first, *different)}) == 8


def flip_a_bit(folder: Path) -> None:
    with (folder / ROWS).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def cut(folder: Path) -> None:
    os.truncate(folder / ROWS, (folder / ROWS).stat().st_size - 1)


def swap_about(folder: Path) -> None:
    about = json.loads((folder / "about.json").read_text())
    (folder / "about.json").write_text(json.dumps(about | {"size": 99}))


DAMAGE = {
    "a bit": flip_a_bit,
    "the end": cut,
    "manifest": lambda folder: (folder / "manifest.json").unlink(),
    "rows": lambda folder: (folder / ROWS).unlink(),
    "other rows": swap_about,
    "garbage": lambda folder: (folder / ROWS).write_bytes(b"x" * 100),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_rows_are_extracted_again_and_one_line_says_so(model, part, run_folder, caplog, damage):
    rows = np.array(FeatureCache(run_folder, [model], ALONE).rows(model, part, "pooled"))
    (folder,) = sets(run_folder)
    DAMAGE[damage](folder)
    assert np.array_equal(FeatureCache(run_folder, [model], ALONE).rows(model, part, "pooled"), rows)
    assert caplog.text.count(f"{folder} are damaged") == 1
    caplog.clear()
    FeatureCache(run_folder, [model], ALONE).rows(model, part, "pooled")
    assert "damaged" not in caplog.text


def test_a_bad_image_is_named_and_nothing_is_left(model, run_folder, tmp_path):
    part = labelled(write_tinted(tmp_path / "bad.tar", 70, 0, bad=66))
    with pytest.raises(ShardError, match=r"bad\.tar: sample '066': cannot decode the image.*iwm shards check"):
        FeatureCache(run_folder, [model], ALONE).rows(model, part, "tokens")
    assert [path.name for path in (run_folder / "features").iterdir()] == [".lock"]


def test_only_the_encoders_in_use_keep_their_features(model, part, run_folder, caplog):
    caplog.set_level(logging.INFO)
    control, later = other_weights(model), other_weights(other_weights(model))
    cache = FeatureCache(run_folder, [model, control], ALONE)
    for one in (model, control):
        cache.rows(one, part, "pooled")
    before = sets(run_folder)
    kept = np.array(FeatureCache(run_folder, [control, later], ALONE).rows(control, part, "pooled"))
    assert len(before) == 2 and len(sets(run_folder)) == 1 and set(sets(run_folder)) < set(before)
    assert np.array_equal(kept, extract_features(control, part).features.numpy())
    assert f"of other checkpoints from {run_folder / 'features'}, sets of images: 1" in caplog.text


def test_who_else_writes_into_the_folder_is_waited_for(model, part, run_folder, caplog):
    caplog.set_level(logging.INFO)
    cache, found = FeatureCache(run_folder, [model], ALONE), []
    with (run_folder / "features" / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=lambda: found.append(cache.rows(model, part, "pooled")))
        waiting.start()
        while "waiting for another process" not in caplog.text:
            time.sleep(0.01)
        assert not found and not sets(run_folder)
    waiting.join(60)
    assert found[0].shape == (70, 32)


def test_too_little_room_is_said_with_the_size_before_anything_is_written(model, part, run_folder):
    cache = FeatureCache(run_folder, [model], ALONE)
    wanted = cache.spec(model, part, "tokens")
    size = 70 * 16 * 32 * 2 / 1e9
    cache.require_room([wanted, wanted], size)
    message = rf"max_cache_gb must be at least {2 * size:.4g}: .*{run_folder}.*max_train_samples, got"
    with pytest.raises(ValueError, match=message):
        cache.require_room([wanted, cache.spec(model, replace(part, samples=part.samples[::-1]), "tokens")], size)
    encoder = replace(model.config.model.encoder, dim=10**12)
    giant = replace(model, config=replace(model.config, model=replace(model.config.model, encoder=encoder)))
    with pytest.raises(ValueError, match=r"2\.24e\+06 GB are still to be written .*make room, or lower max_train_sam"):
        cache.require_room([replace(wanted, model=giant)], 1e9)
    assert sets(run_folder) == []


def place(rank: int, port: str) -> dict[str, str]:
    of_rank = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    return os.environ | of_rank | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | CHILD


def start_ranks(*arguments: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, str(WORKER), *arguments]
    return [
        subprocess.Popen(command, env=place(rank, port), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]


@pytest.mark.multi_rank
def test_two_ranks_keep_the_features_of_one_and_report_the_same(tmp_path):
    run_folder = tinted_run(tmp_path, num_train=150, num_val=66)
    twin = shutil.copytree(run_folder, tmp_path / "twin")
    # three blocks of training images and two of validation: one rank has nothing to do for the last
    ranks = start_ranks(str(run_folder))
    printed = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], printed
    assert printed[0][0] == printed[1][0] != ""
    alone = subprocess.run(
        [sys.executable, str(WORKER), str(twin)], capture_output=True, text=True, check=True,
        env=os.environ | CHILD,
    )  # fmt: skip
    assert alone.stdout == printed[0][0]
    kept = [{path.name: digests(path) for path in sets(folder)} for folder in (run_folder, twin)]
    assert len(kept[0]) == 8 and kept[0] == kept[1]


@pytest.mark.multi_rank
def test_rows_of_killed_ranks_are_not_taken_for_whole_and_do_not_pile_up(tmp_path):
    run_folder = tinted_run(tmp_path, num_train=150, num_val=66)
    for _ in range(2):
        ranks = start_ranks(str(run_folder), "kill")
        for rank in ranks:
            rank.communicate(timeout=300)
        assert ranks[0].returncode == -signal.SIGKILL
        assert [path.name.startswith(".unfinished-") for path in (run_folder / "features").iterdir()].count(True) == 1
        assert sets(run_folder) == []
    model = world_model.load(run_folder)
    part = labelled(str(tmp_path / "train.tar"), 150)
    rows = FeatureCache(run_folder, [model], ALONE).rows(model, part, "pooled")
    assert np.array_equal(rows, extract_features(model, part).features.numpy())
    assert not [path for path in (run_folder / "features").iterdir() if path.name.startswith(".unfinished-")]
