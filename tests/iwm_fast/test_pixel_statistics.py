"""`data.pixel_mean` and `data.pixel_std` reach everything that normalises images or restores their pixels."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

import iwm_fast
from fixtures.tar_files import photograph
from fixtures.tiny_pretraining import tiny_run
from iwm_fast.checkpoints import pretrained
from iwm_fast.checkpoints.checkpoint import CONFIG
from iwm_fast.checkpoints.export import export
from iwm_fast.commands.show_batch import show_batch
from iwm_fast.config.commands import ExportConfig
from iwm_fast.config.fingerprint import fingerprint
from iwm_fast.config.loading import load_run_config
from iwm_fast.config.run import RunConfig
from iwm_fast.evals import datasets
from iwm_fast.evals.retrieval.bank import draw_bank, encode_bank
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.student import build_student
from iwm_fast.pipelines.config import IMAGENET, DataConfig
from iwm_fast.runtime.distributed import single_process
from iwm_fast.train import run
from iwm_fast.training.loaders import evaluation_loader, finetune_loader, open_training_shards, training_loader

MEAN, STD = (0.1, 0.5, 0.9), (0.5, 0.25, 1.0)


def with_statistics(config: RunConfig, mean=MEAN, std=STD) -> RunConfig:
    return replace(config, data=replace(config.data, pixel_mean=mean, pixel_std=std))


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory):
    config = tiny_run(tiny_shards, tmp_path_factory.mktemp("statistics") / "run", loader="torch")
    run(with_statistics(replace(config, optim=replace(config.optim, epochs=0.5, warmup_epochs=0.1))))
    return config.output.folder


@pytest.mark.parametrize("backend", ["torch", "dali"])
def test_all_loaders_normalise_with_the_settings(tiny_shards, tmp_path, backend):
    config, process = tiny_run(tiny_shards, tmp_path / "run", loader=backend), single_process("cpu")
    shards = open_training_shards(config.data)
    builders = {
        "training": lambda config: training_loader(config, shards, process),
        "evaluation": lambda config: evaluation_loader(config, shards, np.arange(4), process.device),
        "finetuning": lambda config: finetune_loader(config, None, shards, process),
    }
    for name, build in builders.items():
        views = []
        for changed in (config, with_statistics(config)):
            loader = build(changed)
            views.append(next(loader).source_view)
            loader.close()
        pixels = views[0] * torch.tensor(IMAGENET.std)[:, None, None] + torch.tensor(IMAGENET.mean)[:, None, None]
        expected = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        torch.testing.assert_close(views[1], expected, atol=1e-5, rtol=1e-5, msg=lambda text, name=name: name + text)


def test_an_export_carries_the_statistics_to_timm_and_to_iwm_fast(trained, tmp_path):
    folder = export(ExportConfig(run=str(trained), to=str(tmp_path / "export")))
    assert "minus the mean (0.1, 0.5, 0.9), divided by the standard deviation (0.5, 0.25, 1.0)" in (
        (folder / "README.md").read_text()
    )
    encoder = timm.create_model(f"local-dir:{folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(encoder)
    assert (tuple(data["mean"]), tuple(data["std"])) == (MEAN, STD)
    image = Image.fromarray(photograph("coffee.png")[:16, :16])
    expected = (torch.tensor(np.asarray(image)).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    for model in (iwm_fast.load(trained), iwm_fast.load(folder)):
        torch.testing.assert_close(model.load_image(image)[0], expected.permute(2, 0, 1))
    torch.testing.assert_close(timm.data.create_transform(**data)(image), expected.permute(2, 0, 1))


def test_evaluations_and_pictures_restore_the_pixels(trained, tiny_shards, tmp_path):
    model = iwm_fast.load(trained)
    shards = open_training_shards(model.config.data)
    plain = replace(model, config=with_statistics(model.config, *IMAGENET))
    (pixels, _), (expected, _) = (next(datasets.clean_images(one, shards, np.arange(1))) for one in (model, plain))
    assert torch.equal(pixels, expected)
    bank = draw_bank(pixels, 0, 2, model=model, strengths="default", seed=0)
    images = [image.numpy() for image in bank.pixels]
    torch.testing.assert_close(encode_bank(model, bank), model.encode_targets(images).flatten(1))
    pictures = []
    for name, config in (("a", model.config), ("b", plain.config)):
        path = show_batch(replace(config, output=replace(config.output, folder=str(tmp_path / name))))
        pictures.append(np.asarray(Image.open(path)))
    assert np.array_equal(*pictures)


def test_runs_of_earlier_versions_have_the_defaults(trained, tmp_path):
    tree = yaml.safe_load(Path(trained, CONFIG).read_text())
    del tree["data"]["pixel_mean"], tree["data"]["pixel_std"]
    (tmp_path / CONFIG).write_text(yaml.safe_dump(tree))
    config = load_run_config(tmp_path)
    assert config.data.normalization == IMAGENET
    flat = fingerprint(config, "digest")
    assert flat["data.pixel_mean"] is None and flat["data.pixel_std"] is None
    changed = fingerprint(with_statistics(config), "digest")
    assert {name for name in flat if flat[name] != changed[name]} == {"data.pixel_mean", "data.pixel_std"}


def test_a_run_that_starts_from_other_statistics_says_so(trained, tiny_shards, tmp_path):
    config = replace(tiny_run(tiny_shards, tmp_path / "run"), init_from=str(trained))
    remarks = pretrained.read_pretrained_weights(config, build_student(config, REFERENCE)).remarks
    assert any("data.pixel_mean=[0.1, 0.5, 0.9] data.pixel_std=[0.5, 0.25, 1.0]" in remark for remark in remarks)


def test_images_that_are_not_normalised_are_refused_by_the_runs_own_range(trained):
    model = iwm_fast.load(trained)
    zero_to_one = torch.linspace(0, 1, 16 * 16).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    for images in (zero_to_one, 255 * zero_to_one):
        with pytest.raises(ValueError, match="not normalised"):
            model.load_image(images)
    identity = replace(model, config=with_statistics(model.config, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)))
    assert torch.equal(identity.load_image(zero_to_one), zero_to_one)


@pytest.mark.parametrize(
    ("name", "value"),
    [("pixel_mean", (123.7, 116.3, 103.5)), ("pixel_mean", (-0.1, 0.5, 0.5)), ("pixel_mean", (float("nan"), 0.5, 0.5)),
     ("pixel_std", (58.4, 57.1, 57.4)), ("pixel_std", (0.0, 0.2, 0.2)), ("pixel_std", (0.2, 0.2, float("inf")))],
)  # fmt: skip
def test_impossible_statistics_are_refused(name, value):
    with pytest.raises(ValueError, match=rf"data\.{name} must lie between .* and 1: divide a .* by 255, got"):
        DataConfig(**{name: value})
