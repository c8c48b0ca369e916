"""`data.image` chooses the same images in training, evaluations, embeddings and replays."""

import os
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import iwm_fast
from fixtures.tar_files import TinyShards, write_tar
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.commands.check_run import inspect_run
from iwm_fast.commands.check_shards import check_shards
from iwm_fast.commands.doctor import OK, Subject, check_data
from iwm_fast.commands.embed import embed
from iwm_fast.commands.replay_step import replay_step
from iwm_fast.commands.resize_shards import resize
from iwm_fast.commands.show_batch import show_batch
from iwm_fast.config.commands import CheckConfig, CheckShardsConfig, EmbedConfig, ReplayConfig
from iwm_fast.config.evaluation import EvalDataConfig, KnnConfig
from iwm_fast.config.run import RunConfig
from iwm_fast.evals.probing.knn import evaluate_knn
from iwm_fast.pipelines.config import ResizeConfig
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.runtime.distributed import single_process
from iwm_fast.train import run


@pytest.fixture(scope="module")
def pairs(tiny_shards, tmp_path_factory) -> TinyShards:
    """Write the tiny shards with their images as left.jpg, each beside the image of another sample as right.jpg."""
    folder = tmp_path_factory.mktemp("pairs")
    for path in sorted(tiny_shards.folder.glob("*.tar")):
        with tarfile.open(path) as archive:
            files = {member.name: archive.extractfile(member) for member in archive}
            content = {name: file.read() for name, file in files.items() if file}
        images = [name for name in content if name.endswith(".jpg")]
        members = []
        for number, name in enumerate(images):
            key = name.removesuffix(".jpg")
            other = content[images[number - 1]]
            members += [(f"{key}.left.jpg", content[name]), (f"{key}.right.jpg", other)]
            members.append((f"{key}.cls", content[f"{key}.cls"]))
        write_tar(folder / path.name, members)
    return TinyShards(pattern=f"{folder}/tiny-{{000000..000002}}.tar", folder=folder)


def config_of(shards: TinyShards, folder: Path, image: str) -> RunConfig:
    config = tiny_run(shards, folder, loader="torch")
    return replace(
        config,
        data=replace(config.data, val=shards.pattern, image=image),
        optim=replace(config.optim, epochs=2.0),
        output=replace(config.output, action_log=True),
    )


def knn_accuracy(folder: Path, data: EvalDataConfig = EvalDataConfig()) -> tuple[float, float | None]:  # noqa: B008
    (row,) = evaluate_knn(KnnConfig(run=str(folder), max_train_samples=20, data=data)).rows
    return row.value, row.control


def test_training_and_everything_after_it_read_the_chosen_image(pairs, tiny_shards, tmp_path):
    plain, left = tmp_path / "plain", tmp_path / "left"
    run(config_of(tiny_shards, plain, ""))
    run(config_of(pairs, left, "left.jpg"))
    models = [iwm_fast.load(folder) for folder in (plain, left)]
    torch.testing.assert_close(models[0].encoder.state_dict(), models[1].encoder.state_dict(), rtol=0, atol=0)
    assert knn_accuracy(plain) == knn_accuracy(left)
    data = EvalDataConfig(train=tiny_shards.pattern, val=tiny_shards.pattern, image="jpg")
    assert knn_accuracy(left, data) == knn_accuracy(plain)
    for folder in (plain, left):
        embed(EmbedConfig(run=str(folder), to=str(tmp_path / f"{folder.name}.parquet")))
    tables = [parquet.read_table(tmp_path / f"{folder.name}.parquet") for folder in (plain, left)]
    assert tables[0].equals(tables[1])
    pictures = [replay_step(ReplayConfig(run=str(folder), step=3)).read_bytes() for folder in (plain, left)]
    assert len(pictures[0]) > 1000 and len(pictures[1]) > 1000
    with pytest.raises(CheckpointError, match=r"data\.image: left\.jpg -> right\.jpg"):
        run(replace(config_of(pairs, left, "right.jpg"), resume="auto"))


def test_commands_before_training_read_the_chosen_image(pairs, tiny_shards, tmp_path):
    pictures = []
    for shards, image in ((tiny_shards, ""), (pairs, "left.jpg")):
        config = config_of(shards, tmp_path / (image or "plain"), image)
        report, _ = inspect_run(config, CheckConfig())
        assert report.problems == []
        # Its data are those of the first shard.
        result = check_data(Subject(config, single_process("cpu")))
        assert result.status == OK and "20 images of" in result.text
        pictures.append(show_batch(config))
    images = [np.asarray(Image.open(path)) for path in pictures]
    # The titles name the shards.
    assert np.array_equal(*(image[image.shape[0] // 8 :] for image in images))


def test_smaller_shards_hold_the_chosen_image(pairs, tmp_path):
    resize(pairs.pattern, tmp_path / "small", ResizeConfig(shorter=24, image="left.jpg"), num_processes=1)
    for path in (tmp_path / "small").glob("*.tar"):
        # The check waits until a shard is old enough for its index to be stored.
        os.utime(path, (1_700_000_000, 1_700_000_000))
    check_shards(str(tmp_path / "small"), CheckShardsConfig(image="left.jpg"), num_processes=1)
    before, after = (open_shards(spec, "left.jpg") for spec in (pairs.pattern, str(tmp_path / "small")))
    assert [shard.keys for shard in before.shards] == [shard.keys for shard in after.shards]
    assert all((a.image_size <= b.image_size).all() for a, b in zip(after.shards, before.shards, strict=True))
