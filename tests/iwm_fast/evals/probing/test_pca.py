"""`iwm pca`: patch features as colours."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fixtures.tar_files import encode, photograph
from fixtures.tinted_shards import pretrain_on_tinted_shards
from iwm_fast import cli
from iwm_fast.config.evaluation import EvalDataConfig, PcaConfig
from iwm_fast.evals.probing.pca import draw_pca, principal_maps


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return pretrain_on_tinted_shards(tmp_path_factory.mktemp("tinted"))


def size(path: Path) -> tuple[int, int]:
    """Return width and height of a picture."""
    with Image.open(path) as picture:
        return picture.size


def test_colours_follow_the_three_directions_of_largest_variance():
    generator = np.random.default_rng(0)
    # Four independent directions of decreasing spread, in a rotated space with a large offset.
    scores = generator.normal(size=(2, 16, 4)) * (4.0, 2.0, 1.0, 0.1)
    rotation = np.linalg.qr(generator.normal(size=(6, 6)))[0][:4]
    maps, shares = principal_maps(torch.from_numpy(scores @ rotation + 100).float())
    assert maps.shape == (2, 4, 4, 3) and maps.dtype == np.uint8
    variance = scores.reshape(-1, 4).var(axis=0)
    np.testing.assert_allclose(shares, variance[:3] / variance.sum(), atol=0.1)
    for component in range(3):
        correlation = np.corrcoef(maps[..., component].ravel(), scores[..., component].ravel())[0, 1]
        assert abs(correlation) > 0.9
    assert maps.min() == 0 and maps.max() == 255


@pytest.mark.parametrize("tokens", [torch.ones(2, 4, 8), torch.randn(1, 1, 8)], ids=["constant", "one patch"])
def test_features_without_variance_give_one_colour(tokens):
    maps, shares = principal_maps(tokens)
    assert len(np.unique(maps)) == 1 and np.allclose(shares, 0)


def test_the_command_draws_evenly_spaced_validation_images_in_the_run_folder(trained, capsys):
    cli.main(["pca", f"run={trained}", "num_images=3", "size=24", "layers=2"])
    path = trained / "pca_size24_layers2.png"
    assert capsys.readouterr().out.strip() == str(path)
    width, height = size(path)
    # Three columns and three rows: images, maps, and maps of the untrained encoder.
    assert 0.9 < width / height < 1.3


def test_images_of_a_folder_are_drawn_alike_each_time(trained, tmp_path):
    folder = tmp_path / "images"
    (folder / "b").mkdir(parents=True)
    for number, name in enumerate(("a.jpg", "b/a.jpg", "c.png")):
        (folder / name).write_bytes(encode(photograph("coffee.png")[40 * number : 40 * number + 50, :70]))
    config = PcaConfig(run=str(trained), images=str(folder), picture=str(tmp_path / "first.png"))
    contents = [draw_pca(replace(config, picture=str(tmp_path / name))).read_bytes() for name in ("1.png", "2.png")]
    assert contents[0] == contents[1]
    few = draw_pca(replace(config, num_images=2, picture=str(tmp_path / "few.png")))
    assert size(few) < size(tmp_path / "1.png")
    alone = draw_pca(replace(config, images=str(folder / "c.png"), picture=str(tmp_path / "one.png")))
    assert size(alone) < size(few)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": "a.jpg"}, r"picture must end with \.png"),
        ({"num_images": 0}, r"num_images must be between 1 and 100"),
        ({"images": "a", "data": EvalDataConfig(val="b")}, r"images and data\.val must not both be set"),
        ({"data": EvalDataConfig(train="b")}, r"data\.train must be unset; name the shards to show in data\.val"),
    ],
)
def test_settings_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PcaConfig(run="r", **change)


def test_files_that_are_missing_or_no_images_are_named(trained, tmp_path):
    (tmp_path / "half.jpg").write_bytes(encode(photograph("coffee.png")[:50, :70])[:300])
    config = PcaConfig(run=str(trained), picture=str(tmp_path / "p.png"))
    with pytest.raises(ValueError, match=r"half\.jpg must be a complete image"):
        draw_pca(replace(config, images=str(tmp_path)))
    with pytest.raises(FileNotFoundError, match=r"images=.*nowhere must be an image file or a folder of images"):
        draw_pca(replace(config, images=str(tmp_path / "nowhere")))
    assert not (tmp_path / "p.png").exists()
