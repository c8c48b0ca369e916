"""Labelled sets: class numbers mean the same classes in training and validation shards, or are refused."""

import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fixtures.painted_shards import pretrain_on_painted_shards, write_painted_shard
from fixtures.tar_files import write_tar
from iwm_fast.config.loading import build
from iwm_fast.evals.datasets import LabelledSets, label_sets, require_readable
from iwm_fast.evaluate import EVALUATIONS, import_object
from iwm_fast.pipelines.config import PackConfig
from iwm_fast.pipelines.errors import ShardError
from iwm_fast.pipelines.storage.shard_set import open_shards
from iwm_fast.pipelines.storage.shard_writer import pack_folder
from iwm_fast.pipelines.validate import validate_shard


def pack(folder: Path, names: list[str], classes: str = "") -> str:
    """Pack two images of each class and return the folder of the shards."""
    for name in names:
        (folder / "images" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "images" / name / f"{number}.png")
    pack_folder(folder / "images", folder / "shards", PackConfig(classes=classes))
    return str(folder / "shards")


def labelled(train: str, val: str, label: str = "cls") -> LabelledSets:
    return label_sets(open_shards(train), open_shards(val), label)


def test_equal_numbers_with_other_class_names_are_refused(tmp_path):
    train = pack(tmp_path / "train", ["ant", "bee", "cat"])
    val = pack(tmp_path / "val", ["ant", "cat"])
    message = f"class 1 is 'bee' in {train}/classes.json, but 'cat' in {val}/classes.json; pack both sets together"
    with pytest.raises(ShardError) as refused:
        labelled(train, val)
    assert message in str(refused.value)
    assert "val_share=" in str(refused.value) and str(refused.value).endswith(f"with classes={train}/classes.json")
    # The remedy works, and labels that are names have the same meaning in both folders anyway.
    again = pack(tmp_path / "again", ["ant", "cat"], f"{train}/classes.json")
    assert set(labelled(train, again).val.number.tolist()) == {0, 2}
    assert set(labelled(train, val, "json.class").val.number.tolist()) == {0, 2}


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_class_names_of_all_folders_of_a_set_are_compared(tmp_path, address):
    first, second, third = (
        address.format(pack(tmp_path / str(number), names))
        for number, names in enumerate((["ant"], ["ant", "bee"], ["ant", "cat"]))
    )
    assert labelled(f"{first}::{second}", first).classes == ("0", "1")
    with pytest.raises(ShardError, match=r"class 1 is 'bee' in .*1/shards/classes\.json, but 'cat' in .*2/shards/"):
        labelled(f"{first}::{second}", third)


@pytest.mark.parametrize("content", [None, "{", json.dumps({"ant": 0}), "[1, 2]"])
def test_shards_without_a_list_of_class_names_are_not_compared(tmp_path, content, caplog):
    train, val = pack(tmp_path / "train", ["ant", "bee"]), pack(tmp_path / "val", ["cat", "dog"])
    path = Path(val, "classes.json")
    path.unlink()
    if content is not None:
        path.write_text(content)
    assert labelled(train, val).classes == ("0", "1")
    assert (f"the class names in {path} are not compared" in caplog.text) == (content is not None)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> str:
    return pretrain_on_painted_shards(tmp_path_factory.mktemp("readable"))


def painted(path: Path, *, bad: dict[str, bytes | int], count: int = 12) -> str:
    """Write a shard of painted images, some of them replaced by other bytes or cut to a number of bytes."""
    write_painted_shard(path, count, seed=3)
    with tarfile.open(path) as archive:
        contents = {info.name: archive.extractfile(info).read() for info in archive}
    wrong = {f"{key}.jpg": value for key, value in bad.items()}
    contents |= {name: contents[name][:value] if isinstance(value, int) else value for name, value in wrong.items()}
    write_tar(path, list(contents.items()))
    return str(path)


SETTINGS = {
    "multitask": ["tasks={folder}/tasks.yaml"], "segment": ["arms=head"], "finetune": ["arms=encoder"],
    "imagine": ["num_images=1"],
}  # fmt: skip


@pytest.mark.parametrize("name", [*EVALUATIONS, "imagine"])
def test_evaluations_name_all_bad_images_before_the_first_is_encoded(run_folder, tmp_path, name):
    val = painted(tmp_path / "val.tar", bad={"0003": 800, "0009": b"<html>not found</html>"})
    imagine = ("iwm_fast.evals.retrieval.visualize:imagine", "iwm_fast.config.evaluation:ImagineConfig")
    (tmp_path / "tasks.yaml").write_text("left: {label: cls}\n")
    settings_of_task = [setting.format(folder=tmp_path) for setting in SETTINGS.get(name, [])]
    evaluation = EVALUATIONS.get(name)
    target, settings = (evaluation.target, evaluation.config) if evaluation else imagine
    config = build(import_object(settings), {}, [f"run={run_folder}", f"data.val={val}", *settings_of_task])
    with pytest.raises(ShardError) as refused:
        import_object(target)(config)
    message = str(refused.value)
    assert message.startswith("2 images of this evaluation cannot be decoded:\n")
    assert f"{val}:0003 is truncated: the end marker of JPEG is missing\n" in message
    assert f"{val}:0009 is not an image, it begins with b'<html>not found<'\n" in message
    assert message.endswith("run `iwm shards check` on these shards to leave the images out")


def test_bad_images_of_all_sets_are_named_together_and_many_are_counted(tmp_path):
    train = painted(tmp_path / "train.tar", bad={f"{number:04}": number for number in range(25)}, count=30)
    val = painted(tmp_path / "val.tar", bad={"0001": 0})
    sets = [(shards, np.arange(shards.num_samples)) for shards in (open_shards(train), open_shards(val))]
    with pytest.raises(ShardError, match=r"26 images(.|\n)*train\.tar:0000 has 0 bytes(.|\n)*\.\.\. and 6 more"):
        require_readable(*sets)
    # Samples that are not selected do not matter, and those that the check has left out are not drawn.
    require_readable((sets[0][0], np.arange(25, 30)), (sets[1][0], np.array([0, 2])))
    for path in (train, val):
        os.utime(path, ns=(10**18, 10**18))
        validate_shard(path)
    assert all(shard.is_checked for path in (train, val) for shard in open_shards(path).shards)
    require_readable(*((shards, np.arange(shards.num_samples)) for shards in (open_shards(train), open_shards(val))))
