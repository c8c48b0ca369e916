"""`iwm embed`: one row per image with its name, label and feature; bad images are left out."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet

import iwm_fast
from fixtures.tar_files import encode, photograph
from fixtures.tinted_shards import pretrain_on_tinted_shards, write_tinted_shard
from iwm_fast import cli
from iwm_fast.checkpoints.export import export
from iwm_fast.commands.embed import embed
from iwm_fast.config.commands import EmbedConfig, ExportConfig
from iwm_fast.config.evaluation import EvalDataConfig


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return pretrain_on_tinted_shards(tmp_path_factory.mktemp("tinted"))


@pytest.fixture
def images(tmp_path) -> Path:
    """Write three images in two folders, a truncated one, and a file that is no image."""
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    pixels = photograph("coffee.png")
    for number, name in enumerate(("a.jpg", "c.JPG", "b/d.png")):
        kind = "PNG" if name.endswith("png") else "JPEG"
        (folder / name).write_bytes(encode(pixels[number * 20 : number * 20 + 50, :70], kind))
    (folder / "b" / "half.jpg").write_bytes(encode(pixels[:50, :70])[:300])
    (folder / "notes.txt").write_text("not an image")
    return folder


def feature_column(path: Path) -> np.ndarray:
    column = parquet.read_table(path)["feature"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def test_image_files_have_paths_features_and_metadata(trained, images, tmp_path, caplog):
    result = embed(EmbedConfig(run=str(trained), images=str(images), to=str(tmp_path / "f.parquet")))
    table, model = parquet.read_table(tmp_path / "f.parquet"), iwm_fast.load(trained)
    assert table["path"].to_pylist() == ["a.jpg", "b/d.png", "c.JPG"]
    assert str(table.schema.field("feature").type) == "fixed_size_list<element: float>[32]"
    metadata = {name.decode(): value.decode() for name, value in table.schema.metadata.items()}
    assert (metadata["num_patches"], metadata["dim"], metadata["step"], metadata["pool"]) == ("16", "32", "3", "mean")
    expected = model.encode([images / name for name in table["path"].to_pylist()]).mean(1)
    np.testing.assert_allclose(feature_column(tmp_path / "f.parquet"), expected, atol=1e-6)
    assert "half.jpg must be a complete image" in caplog.text and "it is left out" in caplog.text
    assert str(result).endswith("f.parquet: 3 images, features of 32, 1 could not be read and are left out")


def test_features_without_pooling_are_those_of_all_patches(trained, images, tmp_path):
    settings = {"run": str(trained), "images": str(images / "a.jpg"), "pool": "none"}
    result = embed(EmbedConfig(to=str(tmp_path / "f.parquet"), **settings))
    embed(EmbedConfig(to=str(tmp_path / "f.npz"), **settings))
    expected = iwm_fast.load(trained).encode(images / "a.jpg")
    np.testing.assert_allclose(feature_column(tmp_path / "f.parquet"), expected.flatten(1), atol=1e-6)
    with np.load(tmp_path / "f.npz") as arrays:
        np.testing.assert_allclose(arrays["feature"], expected, atol=1e-6)
        assert arrays["path"].tolist() == ["a.jpg"] and arrays["num_patches"] == 16
    assert result.shape == (16, 32)


def test_each_real_file_has_one_row_and_what_cannot_be_read_is_named(trained, images, tmp_path, caplog):
    (images / "loop").symlink_to(".")
    (images / "b" / "again.jpg").symlink_to("../a.jpg")
    (images / "b" / "gone.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(images / "pipe.jpg")
    for hidden in (".cache/a.jpg", "b/@eaDir/a.jpg"):
        (images / hidden).parent.mkdir()
        (images / hidden).write_bytes((images / "a.jpg").read_bytes())
    os.rename(images / "c.JPG", images / os.fsdecode(b"\xff\x1b.JPG"))
    embed(EmbedConfig(run=str(trained), images=str(images), to=str(tmp_path / "f.parquet")))
    assert parquet.read_table(tmp_path / "f.parquet")["path"].to_pylist() == ["a.jpg", "b/d.png", "\\xff\x1b.JPG"]
    assert "gone.jpg is a link that cannot be followed" in caplog.text and "pipe.jpg is a pipe" in caplog.text


@pytest.mark.parametrize("loader", ["torch", "dali"])
def test_shards_have_keys_and_labels_and_bad_images_are_left_out(trained, tmp_path, loader, caplog):
    shard, folder = write_tinted_shard(tmp_path / "more.tar", 70, 0, bad=66), trained
    if loader == "dali":
        # An export names no loader, and the default is DALI.
        folder = export(ExportConfig(run=str(trained), to=str(tmp_path / "export")))
    for label, expected in (("cls", 0), ("json.look.tint", "red")):
        to = tmp_path / f"{label}.parquet"
        result = embed(EmbedConfig(run=str(folder), data=EvalDataConfig(val=shard, label=label), to=str(to)))
        table = parquet.read_table(to)
        assert (result.num_images, result.num_left_out) == (69, 1)
        assert table["key"].to_pylist() == [f"{number:03}" for number in range(70) if number != 66]
        assert table["label"][0].as_py() == expected
    assert "066" in caplog.text and "it is left out, bad samples so far: 1" in caplog.text
    features = torch.tensor(feature_column(to))
    assert torch.isfinite(features).all() and len(features.unique(dim=0)) == 69


def test_an_unknown_checkpoint_is_refused_before_images_are_read(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has a checkpoint \(3\)"):
        embed(EmbedConfig(run=str(trained), checkpoint="2", images="absent", to=str(tmp_path / "f.npz")))


def test_an_existing_file_is_kept_and_failures_leave_nothing(trained, images, tmp_path):
    there = tmp_path / "there.parquet"
    there.write_text("kept")
    with pytest.raises(FileExistsError, match=r"there\.parquet exists already; nothing is overwritten"):
        embed(EmbedConfig(run=str(trained), images=str(images), to=str(there)))
    assert there.read_text() == "kept"
    for to in ("new.parquet", "new.npz"):
        with pytest.raises(ValueError, match="none of the 1 images can be read"):
            embed(EmbedConfig(run=str(trained), images=str(images / "b/half.jpg"), to=str(tmp_path / to)))
    assert {path.name for path in tmp_path.iterdir()} == {"images", "there.parquet"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["images=absent", "to=f.parquet"], "images=absent must be an image file or a folder of images"),
        (["images=.", "to=f.csv"], "to must name a file to write, .parquet or .npz"),
        (["images=.", "data.val=x.tar", "to=f.npz"], "images and data.val must not both be set"),
        (["data.train=x.tar", "to=f.npz"], "data.train must be unset"),
        (["images=.", "to=absent/f.npz"], "to=absent/f.npz must lie in a folder that exists"),
    ],
)
def test_settings_that_do_not_fit_are_refused(trained, arguments, problem, capsys, monkeypatch):
    monkeypatch.chdir(trained)
    with pytest.raises(SystemExit):
        cli.main(["embed", f"run={trained}", *arguments])
    assert problem in capsys.readouterr().err


def test_image_files_need_neither_dali_nor_pyarrow(trained, images, tmp_path):
    code = f"""
import sys
for name in ("nvidia", "nvidia.dali", "pyarrow", "webdataset", "deepspeed"):
    sys.modules[name] = None
from iwm_fast.cli import main
main(["embed", "run={trained}", "images={images}", "to={tmp_path}/f.npz"])
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path}/f.npz: 3 images, features of 32, 1 could not be read and are left out\n"
    assert "half.jpg" in result.stderr
