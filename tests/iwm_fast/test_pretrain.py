"""`iwm_fast.pretrain`: a run from Python, from shards or from a folder of images."""

import logging

import pytest

import iwm_fast
from fixtures.tar_files import encode, photograph
from iwm_fast.config.loading import load_run_config

TINY = {
    "views": {"size": 16, "blur": {"sigma": [0.1, 1.0]}},
    "model": {
        "encoder": {"dim": 16, "depth": 1, "num_heads": 2, "patch_size": 4},
        "predictor": {"dim": 8, "depth": 1, "num_heads": 2},
    },
    "runtime": {"device": "cpu", "engine": "plain", "loader": "torch", "zero_stage": None, "loader_threads": 1},
    "optim.global_batch_size": 16,
    "optim": {"epochs": 1, "warmup_epochs": 0, "lr": 1e-5, "precision": "fp32"},
}


def test_a_model_is_trained_by_the_name_of_its_configuration(tiny_shards, tmp_path):
    model = iwm_fast.pretrain(tiny_shards.pattern, config="vit_s16", output=tmp_path / "run", **TINY)
    assert model.step == 3 and model.config == load_run_config(tmp_path / "run")
    assert model.config.optim.lr == 1e-5 and model.config.model.predictor.dim == 8
    # Not among the settings above, so it comes from the configuration.
    assert model.config.optim.schedule_stretch == 1.25


def test_a_folder_of_images_is_packed_once_next_to_the_run(tmp_path, caplog):
    for number in range(20):
        folder = tmp_path / "images" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.jpg").write_bytes(encode(photograph("coffee.png")[number : number + 40, :40]))
    with caplog.at_level(logging.INFO):
        model = iwm_fast.pretrain(tmp_path / "images", output=tmp_path / "run", **TINY)
        again = iwm_fast.pretrain(tmp_path / "images", output=tmp_path / "run", resume="auto", **TINY)
    assert model.step == again.step == 2
    assert list((tmp_path / "run_shards").glob("*.tar")) and model.config.data.train == str(tmp_path / "run_shards")
    assert f"packing the images of {tmp_path / 'images'} into shards in {tmp_path / 'run_shards'}" in caplog.text
    assert f"using the shards in {tmp_path / 'run_shards'}, which were packed earlier" in caplog.text


def test_settings_and_launches_that_do_not_fit_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown setting 'optim\.epoch'; did you mean 'optim\.epochs'"):
        iwm_fast.pretrain("absent.tar", output=tmp_path / "run", optim={"epoch": 4})
    with pytest.raises(FileNotFoundError, match="no configuration file 'vit_x'"):
        iwm_fast.pretrain("absent.tar", "vit_x", output=tmp_path / "run")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="one process; launch several ranks with"):
        iwm_fast.pretrain("absent.tar", output=tmp_path / "run")
