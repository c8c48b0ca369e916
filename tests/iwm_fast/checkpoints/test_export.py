"""The contents of an export folder, and the networks that timm and iwm-fast build from it."""

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from fixtures.tar_files import encode, photograph
from fixtures.tiny_pretraining import tiny_run
from iwm_fast import world_model
from iwm_fast.checkpoints import checkpoint as checkpoints
from iwm_fast.checkpoints.errors import CheckpointError
from iwm_fast.checkpoints.export import describe_action_entries, export, timm_config
from iwm_fast.config.commands import ExportConfig
from iwm_fast.config.evaluation import MrrConfig
from iwm_fast.config.run import EncoderConfig
from iwm_fast.evals.results import read_result
from iwm_fast.evals.retrieval.mrr import evaluate_mrr
from iwm_fast.kernels.ops import REFERENCE
from iwm_fast.models.encoder import Encoder
from iwm_fast.models.layers import initialize_
from iwm_fast.pipelines.config import IMAGENET
from iwm_fast.pipelines.transforms.composition import ViewConfig
from iwm_fast.pipelines.transforms.operations.crop import Crop
from iwm_fast.pipelines.transforms.operations.flip import Flip
from iwm_fast.pipelines.transforms.operations.jitter import Jitter
from iwm_fast.train import run


@pytest.fixture(scope="module")
def trained(tiny_shards, tmp_path_factory) -> Path:
    """Train a run and evaluate it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = tiny_run(tiny_shards, folder, loader="torch")
    run(replace(config, data=replace(config.data, val=tiny_shards.pattern)))
    evaluate_mrr(MrrConfig(run=str(folder), num_images=2, bank_size=4))
    return folder


@pytest.fixture
def exported(trained, tmp_path) -> Path:
    return export(ExportConfig(run=str(trained), to=str(tmp_path / "export")))


def test_the_exported_encoder_in_timm_has_the_teachers_features(trained, exported):
    encoder, model = timm.create_model(f"local-dir:{exported}", pretrained=True).eval(), world_model.load(trained)
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(encoder.forward_features(images), model.encode(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(encoder(images), model.encode(images).mean(1), atol=1e-5, rtol=1e-5)


def test_timm_prepares_images_as_the_world_model_does(exported, tmp_path):
    encoder, model = timm.create_model(f"local-dir:{exported}", pretrained=True), world_model.load(exported)
    data = timm.data.resolve_model_data_config(encoder)
    assert data["input_size"] == (3, 16, 16) and data["crop_pct"] == 1.0 and data["interpolation"] == "bilinear"
    image = Image.fromarray(photograph("coffee.png")[:64, :64])
    ours, theirs = model.load_image(image)[0], timm.data.create_transform(**data)(image)
    # Pillow and torch round differently, by one of 255 levels.
    torch.testing.assert_close(ours, theirs, atol=0.03, rtol=0)


def test_timm_finetunes_an_export_with_a_new_head(exported):
    classifier = timm.create_model(f"local-dir:{exported}", pretrained=True, num_classes=5)
    assert classifier(torch.randn(2, 3, 16, 16)).shape == (2, 5)
    assert torch.equal(classifier.norm.weight, load_file(exported / "model.safetensors")["norm.weight"])


def test_the_model_card_begins_with_metadata_for_the_hub(exported):
    _, metadata, text = (exported / "README.md").read_text().split("---\n", 2)
    described = yaml.safe_load(metadata)
    assert described["library_name"] == "timm" and "jepa" in described["tags"] and "license" not in described
    assert text.strip().startswith("# ViT 2 x 32, patches of 4")


def test_an_export_has_teacher_and_trained_encoder_which_differ(trained, exported):
    saved = checkpoints.read(checkpoints.find_newest_folder(trained))
    teacher, encoder = (load_file(exported / f"{name}.safetensors") for name in ("model", "trained_encoder"))
    assert teacher.keys() == encoder.keys() == saved.teacher_state.keys()
    assert all(torch.equal(teacher[name], saved.teacher_state[name]) for name in teacher)
    assert torch.equal(encoder["norm.weight"], saved.engine_state["weight/encoder.norm.weight"])
    assert not torch.equal(encoder["norm.weight"], teacher["norm.weight"])


def test_an_export_is_loaded_like_the_run_it_came_from(trained, exported):
    ours, theirs = world_model.load(trained), world_model.load(exported)
    view, action = torch.randn(2, 3, 16, 16), torch.randn(2, 7)
    tokens = ours.encode(view)
    assert torch.equal(theirs.encode(view), tokens)
    assert torch.equal(theirs.predict(view, action), ours.predict(view, action))
    assert theirs.step == ours.step == 12
    assert theirs.config.views == ours.config.views and theirs.config.model == ours.config.model


def test_all_files_of_an_export_have_the_same_permissions(exported):
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1


def test_an_export_names_no_path_of_the_machine_it_was_made_on(exported, trained, tiny_shards):
    for name in ("config.json", "iwm.json", "README.md"):
        text = (exported / name).read_text()
        assert str(trained.parent) not in text and str(tiny_shards.folder) not in text


def test_the_examples_of_the_model_card_work_in_the_export_folder(exported, monkeypatch):
    examples = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    assert [len(example.splitlines()) for example in examples] == [4, 5]
    monkeypatch.chdir(exported)
    # The image that the card's example loads.
    Path("photo.jpg").write_bytes(encode(photograph("coffee.png")))
    names: dict = {}
    for example in examples:
        exec(example, names)
    assert names["features"].shape == (1, 32) and names["imagined"].shape == (1, 16, 32)


def test_the_model_card_has_training_settings_and_results(exported, trained):
    card = (exported / "README.md").read_text()
    measured = read_result(trained / "evaluations" / "mrr_default.json").value("jitter", "mrr")
    assert f"| mrr_default | jitter, mrr | {measured:.4g} | 12 |" in card
    assert re.search(r"\| training \| loss/prediction \| \d", card) and "optim/lr" not in card
    assert "| images | 48, content SHA-256 " in card and "| 4, 16 |" in card
    assert "| 3 | hue | the target's hue is turned by 0.1 of a full circle" in card
    assert card.endswith("## Licence\n\nNot stated yet: name it here when you publish these weights.\n")


def test_all_action_entries_have_a_description():
    views = ViewConfig(
        crop=Crop(source_scale=(0.25, 1.0)), flip=Flip(source_probability=0.5), jitter=Jitter(brightness=0.8)
    )
    entries = describe_action_entries(views)
    assert tuple(entry["name"] for entry in entries) == views.entries
    assert len({entry["one_means"] for entry in entries}) == 12
    assert entries[0]["one_means"] == "the target's brightness factor is 3 times the source's"
    # The side of the smallest crop is half the image's, so its centre is at most a quarter away.
    assert entries[7]["one_means"] == "the source's centre lies 0.25 target widths to the right of the target's"


def test_an_export_overwrites_nothing_and_leaves_nothing_unfinished(trained, tmp_path):
    (tmp_path / "there").mkdir()
    with pytest.raises(FileExistsError, match="exists already"):
        export(ExportConfig(run=str(trained), to=str(tmp_path / "there")))
    assert os.listdir(tmp_path) == ["there"] and not any((tmp_path / "there").iterdir())


def test_a_damaged_export_is_refused_with_the_remedy(exported):
    content = bytearray((exported / "predictor.safetensors").read_bytes())
    content[-1] ^= 1
    (exported / "predictor.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"predictor\.safetensors is") as caught:
        world_model.load(exported)
    assert "export the run again" in caught.value.__notes__[0]


def test_a_run_with_the_identity_predictor_exports_no_world_model(tiny_shards, tmp_path):
    run(tiny_run(tiny_shards, tmp_path / "run", loader="torch", depth=0))
    folder = export(ExportConfig(run=str(tmp_path / "run"), to=str(tmp_path / "export")))
    assert not (folder / "predictor.safetensors").exists()
    assert "no world model" in (folder / "README.md").read_text()
    assert world_model.load(folder).encode(torch.randn(1, 3, 16, 16)).shape == (1, 16, 32)


def test_a_folder_without_checkpoints_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet"):
        export(ExportConfig(run=str(tmp_path), to=str(tmp_path / "export")))


@pytest.mark.parametrize(
    ("size", "patch_sizes"),
    [
        ((192, 12, 3), (16,)),
        ((384, 12, 6), (8, 16, 32)),
        ((768, 12, 12), (8, 16, 32)),
        ((1024, 24, 16), (14, 16, 32)),
        ((1280, 32, 16), (14,)),
    ],
)
def test_standard_sizes_are_built_by_their_names_in_timm(size, patch_sizes):
    dim, depth, num_heads = size
    for patch_size in patch_sizes:
        config = EncoderConfig(dim=dim, depth=depth, num_heads=num_heads, patch_size=patch_size)
        with torch.device("meta"):
            description = timm_config(config, 224, IMAGENET)
            model = timm.create_model(description["architecture"], num_classes=0, **description["model_args"])
            ours = Encoder(config, 224, REFERENCE)
        assert description["architecture"].endswith(f"_patch{patch_size}_224")
        theirs = {name: value.shape for name, value in model.state_dict().items()}
        assert theirs == {name: value.shape for name, value in ours.state_dict().items()}
        assert model.blocks[0].attn.num_heads == num_heads and len(model.blocks) == depth


@pytest.mark.parametrize(
    "config",
    [
        EncoderConfig(dim=192, depth=12, num_heads=3),
        EncoderConfig(dim=48, depth=3, num_heads=4, patch_size=8, mlp_ratio=3.0),
    ],
)
def test_timm_builds_named_and_unnamed_sizes_with_the_same_features(config):
    encoder = Encoder(config, 64, REFERENCE).eval()
    initialize_(encoder, torch.Generator().manual_seed(0))
    description = timm_config(config, 64, IMAGENET)
    model = timm.create_model(description["architecture"], num_classes=0, **description["model_args"]).eval()
    model.load_state_dict(encoder.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        tokens = encoder(images, None).unflatten(0, (2, -1))
        torch.testing.assert_close(model(images), tokens.mean(1), atol=1e-5, rtol=1e-4)
